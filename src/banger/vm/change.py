"""`vm set`: sizes that grow, CPUs and memory that wait for the next start, NAT that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from banger.config.settings import host_memory_mib
from banger.errors import BangerError
from banger.faults import step
from banger.units import format_size
from banger.vm.cleanup import is_live
from banger.vm.create import check_sizes
from banger.vm.handles import Handles, write_handles
from banger.vm.undo import Undo

if TYPE_CHECKING:
    from banger.api.params import SetVm
    from banger.api.records import VmRecord
    from banger.vm.context import VmContext


async def change(ctx: VmContext, vm: VmRecord, params: SetVm) -> tuple[VmRecord, tuple[str, ...]]:
    """Store what is new; return the record and what waits for the next start.

    The disks' files are extended by that start, and the agent grows the mounted filesystems.

    Raises:
        BangerError: bad_request: out of range, smaller than now, or nothing to change.
    """
    check_sizes(params.vcpu, params.memory_mib, params.disk_bytes, params.overlay_bytes)
    if params.memory_mib is not None and params.memory_mib > host_memory_mib():
        raise BangerError(
            "bad_request",
            f"--memory {params.memory_mib} MiB is more than this host's {host_memory_mib()} MiB",
            hint="banger vm set --help",
        )
    async with ctx.locked(vm.id):
        # As it is now: what was asked for before us has been done.
        vm = ctx.store.resolve(vm.id)
        changes: dict[str, Any] = {}
        for flag, field, new in (
            ("--disk-size", "work_disk_bytes", params.disk_bytes),
            ("--system-overlay-size", "overlay_bytes", params.overlay_bytes),
        ):
            old = getattr(vm, field)
            if new is not None and new < old:
                raise BangerError(
                    "bad_request",
                    f"{flag} {format_size(new)}: disks only grow; it has {format_size(old)} now",
                    hint=f"banger vm show {vm.name}",
                )
            if new is not None:
                changes[field] = new
        if params.vcpu is not None:
            changes["vcpu"] = params.vcpu
        if params.memory_mib is not None:
            changes["memory_mib"] = params.memory_mib
        if not changes and params.nat is None:
            raise BangerError(
                "bad_request",
                "nothing to change: name --vcpu, --memory, --disk-size, --system-overlay-size, "
                "--nat or --no-nat",
                hint="banger vm set --help",
            )
        live = is_live(ctx, vm)
        later = list(changes)
        async with Undo() as undo:
            if params.nat is not None:
                # First on the host: a record never promises a way out that is not there.
                if live and not await _change_nat(ctx, vm, undo, nat=params.nat):
                    later.append("nat")
                changes["nat"] = params.nat
            async with step("set.record"):
                vm = ctx.store.update(vm.id, **changes)
            undo.keep()
        return vm, tuple(later) if live else ()


async def _change_nat(ctx: VmContext, vm: VmRecord, undo: Undo, *, nat: bool) -> bool:
    """Open or close the way out of a running VM; False where only a start can (user network)."""
    handles = ctx.handles[vm.id]
    if handles.lease is None:
        return vm.nat == nat
    # Nor is there one that no record knows of, when it is cancelled or cannot be written down.
    undo.push("the change of NAT", lambda: _hold(ctx, vm, handles))
    lease = msgspec.structs.replace(handles.lease, nat=nat)
    await _hold(ctx, vm, msgspec.structs.replace(handles, lease=lease))
    return True


async def _hold(ctx: VmContext, vm: VmRecord, handles: Handles) -> None:
    assert handles.lease is not None
    async with step("set.lease"):
        await ctx.host.prepare(handles.lease)
    async with step("set.handles"):
        write_handles(ctx.vm_paths(vm.id), handles)
        ctx.handles[vm.id] = handles
