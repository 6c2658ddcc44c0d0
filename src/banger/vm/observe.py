"""Looking at VMs: live state, statistics, console. Nothing here changes anything."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from banger.api.stats import VmStats
from banger.errors import BangerError
from banger.files import aside, free_bytes
from banger.host.usage import read_usage
from banger.store.vms import now_text
from banger.terminal_text import TerminalText
from banger.vm import console
from banger.vm.cleanup import is_live

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)

# A guest under load answers late; its figures are not worth more.
_GUEST_S = 5.0
_MOST_WORDS = 500
_LEAST_ELAPSED_S = 0.5
_CHUNK = 64 << 10
_FOLLOW_S = 0.25


async def stats(ctx: VmContext, vm: VmRecord) -> VmStats:
    """Figures of the VMM, of both disks, of the tap and, where it answers, of the guest."""
    if not is_live(ctx, vm):
        ctx.client(vm)  # raises not_running with the VM's own reason
    handles = ctx.handles[vm.id]
    assert handles.process is not None
    paths = ctx.vm_paths(vm.id)
    usage = await asyncio.to_thread(read_usage, handles.process.pid, vm.id, handles.tap)
    guest, problem = None, None
    try:
        async with asyncio.timeout(_GUEST_S):
            guest = msgspec.to_builtins(await ctx.client(vm).stats())
    except BangerError as e:
        # Perhaps in the guest's own words, and it is kept in the record.
        problem = str(e)[:_MOST_WORDS]
    except TimeoutError:
        problem = f"the guest agent gave no figures within {_GUEST_S:g} s"
    now = datetime.now(UTC)
    return VmStats(
        vm=vm.name,
        sampled_at=now_text(),
        vmm_rss_bytes=usage.rss_bytes,
        vmm_cpu_s=usage.cpu_s,
        cpu_percent=cpu_percent(vm.stats, usage.cpu_s, now),
        memory_bytes=usage.memory_bytes,
        memory_limit_bytes=usage.memory_limit_bytes,
        tasks=usage.tasks,
        disk_read_bytes=usage.read_bytes,
        disk_written_bytes=usage.written_bytes,
        overlay_allocated_bytes=_allocated(paths.overlay),
        overlay_promised_bytes=vm.overlay_bytes,
        work_allocated_bytes=_allocated(paths.work),
        work_promised_bytes=vm.work_disk_bytes,
        host_free_bytes=free_bytes(ctx.paths.state),
        network_sent_bytes=usage.sent_bytes,
        network_received_bytes=usage.received_bytes,
        guest=guest,
        guest_error=problem,
    )


def cpu_percent(before: VmStats | None, cpu_s: float, now: datetime) -> float | None:
    """How much of one CPU went by since earlier figures; as before where hardly any time has passed
    since. None for the first figures of a run, and where the clock went back."""
    if before is None or not before.sampled_at or cpu_s < before.vmm_cpu_s:
        return None
    elapsed_s = (now - datetime.fromisoformat(before.sampled_at)).total_seconds()
    if elapsed_s < 0:
        return None
    if elapsed_s < _LEAST_ELAPSED_S:
        return before.cpu_percent
    return round(100 * (cpu_s - before.vmm_cpu_s) / elapsed_s, 1)


async def collect(ctx: VmContext, vm: VmRecord) -> None:
    """Keep the figures of a running VM in its record. One that cannot be looked at is left out."""
    try:
        ctx.store.keep_stats(vm.id, await stats(ctx, vm))
    except BangerError as e:
        log.debug("no figures of VM %s: %s", vm.name, e)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


async def logs(
    ctx: VmContext, vm: VmRecord, *, tail: int | None, follow: bool
) -> AsyncIterator[bytes]:
    """The console, made harmless for a terminal; with `follow` until the VM ends.

    What was moved aside because the console had grown too long comes first.
    """
    text = TerminalText()
    async for data in _console(ctx, vm, tail=tail, follow=follow):
        if shown := text.feed(data):
            yield shown
    if shown := text.finish():
        yield shown


async def _console(
    ctx: VmContext, vm: VmRecord, *, tail: int | None, follow: bool
) -> AsyncIterator[bytes]:
    path = ctx.vm_paths(vm.id).console
    position = 0
    if tail is not None:
        lines = console.tail(path, tail)
        if len(lines) < tail:
            lines = console.tail(aside(path), tail - len(lines)) + lines
        position = path.stat().st_size if path.exists() else 0
        if lines:
            yield ("\n".join(lines) + "\n").encode()
    else:
        async for data in _earlier(aside(path)):
            yield data
    while True:
        live = is_live(ctx, ctx.store.resolve(vm.id)) if follow else False
        data, position = await asyncio.to_thread(_read_from, path, position)
        if data:
            yield data
            continue
        if not live:
            return
        # A regular file cannot be waited for; the console is for people, who read slower.
        await asyncio.sleep(_FOLLOW_S)


async def _earlier(path: Path) -> AsyncIterator[bytes]:
    position = 0
    while True:
        data, position = await asyncio.to_thread(_read_from, path, position)
        if not data:
            return
        yield data


def _read_from(path: Path, position: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as f:
            if f.seek(0, 2) < position:
                position = 0  # it was emptied meanwhile
            f.seek(position)
            data = f.read(_CHUNK)
            return data, position + len(data)
    except FileNotFoundError:
        return b"", position
