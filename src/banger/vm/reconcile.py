"""Reconcile: rows, handles, leases and processes made to agree when a daemon starts.

A VM that is alive is adopted and never touched; what a crash left over is given back.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.files import remove_tree
from banger.host.vmm_process import is_alive
from banger.vm.cleanup import handles_of, release_everything, reset
from banger.vm.create import forget_vm
from banger.vm.start import watch

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.vm.context import VmContext
    from banger.vm.handles import Handles

log = logging.getLogger(__name__)


async def reconcile(ctx: VmContext) -> None:
    """Adopt what lives, clean up what does not. Failures are logged and left in the record."""
    for vm in ctx.store.list():
        try:
            await _reconcile_one(ctx, vm)
        except BangerError as e:
            log.warning("reconciling VM %s: %s", vm.name, e)
    await _release_strangers(ctx)


async def _reconcile_one(ctx: VmContext, vm: VmRecord) -> None:
    handles = handles_of(ctx, vm.id)
    alive = handles is not None and handles.process is not None and is_alive(handles.process)
    if vm.state == "running" and alive and not vm.building:
        assert handles is not None
        await adopt(ctx, vm, handles)
    elif vm.state == "running" and not vm.building:
        log.warning("VM %s ended while no daemon ran", vm.name)
        await reset(ctx, vm, last_error="the machine ended while no daemon was running")
    elif vm.provisional or handles is not None:
        # A start or a create that died half-way: nobody was told of it.
        log.warning("VM %s: an unfinished start is rolled back", vm.name)
        failures = await release_everything(ctx, vm.id, handles)
        if failures:
            ctx.store.update(vm.id, state="error", last_error="; ".join(failures))
        elif vm.provisional:
            await forget_vm(ctx, vm)


async def adopt(ctx: VmContext, vm: VmRecord, handles: Handles) -> None:
    """Take over a running VM: handles in memory, its end watched."""
    assert handles.process is not None
    ctx.handles[vm.id] = handles
    ctx.watch(vm.id, watch(ctx, vm.id, handles.process))
    ctx.names.publish(vm)
    log.info("VM %s runs on (pid %d)", vm.name, handles.process.pid)


async def _release_strangers(ctx: VmContext) -> None:
    known = {vm.id for vm in ctx.store.list()}
    for directory in sorted(ctx.paths.vms.iterdir()):
        # Only what looks like ours: whatever else somebody put there is not ours to remove.
        if re.fullmatch(r"[0-9a-f]{32}", directory.name) and directory.name not in known:
            log.warning("VM directory %s belongs to no VM and is removed", directory.name)
            handles = handles_of(ctx, directory.name)
            # What still holds something keeps its handles for the next daemon.
            if not await release_everything(ctx, directory.name, handles):
                remove_tree(directory)
    if ctx.host.privilege.kind == "none":
        return
    try:
        for lease in (await ctx.host.status()).leases:
            if lease.vm_id not in ctx.handles:
                log.warning("lease %s belongs to no running VM and is released", lease.id)
                await ctx.host.release(lease.id)
    except BangerError as e:
        log.warning("leases could not be compared: %s", e)
