"""Room on the disk that holds the VMs: below the reserve it is told, below a quarter of it running
VMs are paused, because a guest that gets write errors turns its filesystem read-only (spec 4.9).

That a VM is paused stands in its record before its processors stop and until they run again, so
that the next daemon lets go on what this one has paused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.files import free_bytes
from banger.guest.client import GuestClient
from banger.guest.endpoint import VsockEndpoint
from banger.units import MIB, format_size
from banger.vm.cleanup import is_live
from banger.vm.handles import read_secrets

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.vm.context import VmContext
    from banger.vmm.driver import Driver

log = logging.getLogger(__name__)

# Everybody waits for it who wants something of a guest: longer than a loaded guest needs, no more.
_TIME_S = 5.0


def find_warning(state: Path, *, free: int, reserve: int) -> str | None:
    """What is to be said of `free` bytes on the filesystem of `state`; None: there is enough."""
    if free >= reserve:
        return None
    return (
        f"{state} has {format_size(free // MIB * MIB)} free, less than the {format_size(reserve)} "
        f"that are kept in reserve (disk_reserve)"
    )


def must_pause(*, free: int, reserve: int) -> bool:
    return free < reserve // 4


def may_go_on(*, free: int, reserve: int) -> bool:
    """More than what pauses, so that a VM is not paused again by what it writes at once."""
    return free >= reserve // 2


def marked(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """The record as it is shown: a VM that runs carries the warning, if there is one."""
    if not is_live(ctx, vm):
        return vm
    warning = find_warning(
        ctx.paths.state,
        free=free_bytes(ctx.paths.state),
        reserve=ctx.settings.disk_reserve_bytes,
    )
    return msgspec.structs.replace(vm, warning=warning)


async def look(ctx: VmContext) -> str | None:
    """Pause or let go on as the disk demands; the warning that is due, None when there is none.

    A VM with an operation under way is left for the next look.
    """
    free, reserve = free_bytes(ctx.paths.state), ctx.settings.disk_reserve_bytes
    warning = find_warning(ctx.paths.state, free=free, reserve=reserve)
    for vm in ctx.store.list():
        if not is_live(ctx, vm) or ctx.is_locked(vm.id):
            continue
        try:
            if vm.paused is None and warning and must_pause(free=free, reserve=reserve):
                async with ctx.locked(vm.id):
                    await pause(ctx, vm, warning)
            elif vm.paused is not None and may_go_on(free=free, reserve=reserve):
                async with ctx.locked(vm.id):
                    await resume(ctx, vm)
        except BangerError as e:
            log.warning("VM %s, while %s: %s", vm.name, warning or "space is back", e)
    return warning


async def pause(ctx: VmContext, vm: VmRecord, why: str) -> VmRecord:
    """Stop the processors of a VM whose lock the caller holds.

    Raises:
        BangerError: the VMM refused, and the VM runs on.
    """
    driver = await _driver(ctx, vm)
    paused = ctx.store.update(vm.id, paused=why)
    try:
        await driver.pause(_runtime(ctx, vm))
    except BangerError:
        ctx.store.update(vm.id, paused=None)
        raise
    log.warning("VM %s is paused: %s", vm.name, why)
    return paused


async def resume(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """Let the processors of a paused VM run on, and set its clock before anybody is let in.

    Raises:
        BangerError: the VMM refused; the VM stays paused.
    """
    driver = await _driver(ctx, vm)
    await driver.resume(_runtime(ctx, vm))
    await send_time(ctx, vm)
    log.info("VM %s goes on", vm.name)
    return ctx.store.update(vm.id, paused=None)


async def send_time(ctx: VmContext, vm: VmRecord) -> None:
    """Tell a guest the time; its agent sets a clock that is more than a second off.

    A guest that does not answer keeps its clock, which is logged.
    """
    handles = ctx.handles.get(vm.id)
    if handles is None:  # it has ended meanwhile
        return
    try:
        token = read_secrets(ctx.vm_paths(vm.id)).token
        await GuestClient(handles.endpoint, token).set_time(timeout_s=_TIME_S)
    except BangerError as e:
        log.warning("VM %s: its clock was not set: %s", vm.name, e)


async def _driver(ctx: VmContext, vm: VmRecord) -> Driver:
    driver = await ctx.driver()
    if driver.name != ctx.handles[vm.id].vmm:
        raise BangerError(
            "operation_failed",
            f"it runs under {ctx.handles[vm.id].vmm}, and this daemon uses {driver.name}",
            reason="unsupported",
        )
    return driver


def _runtime(ctx: VmContext, vm: VmRecord) -> Path:
    """Where the VMM has its sockets: in its jail, if it is in one."""
    endpoint = ctx.handles[vm.id].endpoint
    return (
        Path(endpoint.path).parent
        if isinstance(endpoint, VsockEndpoint)
        else ctx.vm_paths(vm.id).runtime
    )
