"""Admission: what a start may take of the host's memory and disk (spec 4.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.config.settings import host_memory_mib
from banger.errors import BangerError
from banger.files import free_bytes
from banger.units import MIB, format_size
from banger.vm.cleanup import is_live

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

# What a VMM itself needs beside its guest's memory, MiB.
_VMM_MIB = 64


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


def check_disk(ctx: VmContext, wanted_bytes: int) -> None:
    """Refuse to write when the state filesystem would fall below the reserve.

    Raises:
        BangerError: reason disk_full.
    """
    free = free_bytes(ctx.paths.state)
    reserve = ctx.settings.disk_reserve_bytes
    if free - wanted_bytes < reserve:
        raise BangerError(
            "operation_failed",
            f"{ctx.paths.state} has {format_size(free // MIB * MIB)} free, and "
            f"{format_size(reserve)} are kept in reserve (disk_reserve)",
            hint="banger vm prune",
            reason="disk_full",
        )
