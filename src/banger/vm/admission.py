"""Admission: what a start may take of the host's memory and disk (spec 4.9)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.settings import host_memory_mib
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.kernel.entries import INITRD
from banger.vm.cleanup import is_live

if TYPE_CHECKING:
    from banger.api.records import KernelRecord, VmRecord
    from banger.vm.context import VmContext

# What a VMM itself needs beside its guest's memory, MiB.
_VMM_MIB = 64
# What mkfs.ext4 writes into a blank disk: 4.2 MiB for 8 GiB, 5.4 MiB for 128 GiB (1.47.0).
_BLANK_DISK_BYTES = 6 << 20


def check_memory(ctx: VmContext, vm: VmRecord, *, allow_overcommit: bool) -> None:
    """Refuse a start that the memory budget does not hold.

    Raises:
        BangerError: reason memory_admission: wanted, in use by whom, and the limit.
    """
    if not allow_overcommit:
        _check_budget(ctx, vm)
    # No wait lies between the look and this: of two starts at once the second one sees the first.
    ctx.admitted.add(vm.id)


def _check_budget(ctx: VmContext, vm: VmRecord) -> None:
    total = host_memory_mib()
    budget = total * ctx.settings.memory_budget_percent // 100
    others = [o for o in ctx.store.list() if o.id != vm.id and _counts(ctx, o)]
    used = sum(o.memory_mib + _VMM_MIB for o in others)
    wanted = vm.memory_mib + _VMM_MIB
    if used + wanted <= budget:
        return
    by = ", ".join(f"{o.name} {o.memory_mib} MiB" for o in others)
    in_use = f"; in use: {used} MiB ({by})" if others else ""
    raise BangerError(
        "operation_failed",
        f"starting VM {vm.name} needs {wanted} MiB of memory, but banger may use {budget} of "
        f"this host's {total} MiB{in_use}; --allow-overcommit starts it all the same",
        hint=f"banger vm stop {others[0].name}"
        if others
        else "a smaller --memory, or --allow-overcommit",
        reason="memory_admission",
    )


def _counts(ctx: VmContext, vm: VmRecord) -> bool:
    """Whether a VM has its memory, or is about to: its start was let through and is under way."""
    return is_live(ctx, vm) or (vm.id in ctx.admitted and ctx.is_locked(vm.id))


def check_disk(ctx: VmContext, doing: str, wanted_bytes: int = 0) -> None:
    """Refuse what would leave less than the reserve free in the state directory.

    `wanted_bytes`: what is known to be written. Disks of VMs are sparse and count for nothing.

    Raises:
        BangerError: reason disk_full.
    """
    require_space(
        ctx.paths.state,
        needed_bytes=wanted_bytes,
        reserve_bytes=ctx.settings.disk_reserve_bytes,
        doing=doing,
    )


def start_bytes(ctx: VmContext, vm: VmRecord, kernel: KernelRecord) -> int:
    """What a start writes: an initrd in place of the last one, and disks that are not there yet."""
    paths = ctx.vm_paths(vm.id)
    initrd = (Path(kernel.directory) / INITRD).stat().st_size
    missing = sum(not path.exists() for path in (paths.overlay, paths.work))
    return initrd + missing * _BLANK_DISK_BYTES
