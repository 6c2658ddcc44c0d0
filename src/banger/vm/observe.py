"""Looking at VMs: live state, statistics, console. Nothing here changes anything."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.api.results import VmStats
from banger.errors import BangerError
from banger.files import free_bytes
from banger.vm import console
from banger.vm.cleanup import is_live

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 64 << 10
_FOLLOW_S = 0.25


async def stats(ctx: VmContext, vm: VmRecord) -> VmStats:
    """Figures of the VMM process, of both disks and, where it answers, of the guest."""
    if not is_live(ctx, vm):
        ctx.client(vm)  # raises not_running with the VM's own reason
    handles = ctx.handles[vm.id]
    assert handles.process is not None
    paths = ctx.vm_paths(vm.id)
    rss, cpu_s = await asyncio.to_thread(_process_figures, handles.process.pid)
    guest, problem = None, None
    try:
        guest = msgspec.to_builtins(await ctx.client(vm).stats())
    except BangerError as e:
        problem = str(e)
    return VmStats(
        vm=vm.name,
        vmm_rss_bytes=rss,
        vmm_cpu_s=cpu_s,
        overlay_allocated_bytes=_allocated(paths.overlay),
        overlay_promised_bytes=vm.overlay_bytes,
        work_allocated_bytes=_allocated(paths.work),
        work_promised_bytes=vm.work_disk_bytes,
        host_free_bytes=free_bytes(ctx.paths.state),
        guest=guest,
        guest_error=problem,
    )


def _process_figures(pid: int) -> tuple[int, float]:
    # proc_pid_stat(5); fields are counted after the last ')', for the name may hold anything.
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0, 0.0
    return int(fields[21]) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


async def logs(
    ctx: VmContext, vm: VmRecord, *, tail: int | None, follow: bool
) -> AsyncIterator[bytes]:
    """The console, made harmless for a terminal; with `follow` until the VM ends."""
    path = ctx.vm_paths(vm.id).console
    position = 0
    if tail is not None:
        lines = console.tail(path, tail)
        position = path.stat().st_size if path.exists() else 0
        if lines:
            yield ("\n".join(lines) + "\n").encode()
    while True:
        live = is_live(ctx, ctx.store.resolve(vm.id)) if follow else False
        data, position = await asyncio.to_thread(_read_from, path, position)
        if data:
            yield console.clean(data)
            continue
        if not live:
            return
        # A regular file cannot be waited for; the console is for people, who read slower.
        await asyncio.sleep(_FOLLOW_S)


def _read_from(path: Path, position: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as f:
            f.seek(position)
            # Not half a character, which would escape the cleaning of either half.
            data = f.read(_CHUNK).rstrip(b"\xc2")
            return data, position + len(data)
    except FileNotFoundError:
        return b"", position
