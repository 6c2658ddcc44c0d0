"""Stop, kill, delete: how a VM ends. Once begun they finish, also when the client has left."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.faults import step
from banger.host.vmm_process import signal_vmm, wait_exit
from banger.vm.cleanup import handles_of, is_live, reset
from banger.vm.create import forget_vm
from banger.vm.space import resume

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)

# An agent that does not even take a connection is not asked twice (spec 4.6).
_CONNECT_S = 2.0
# What the agent accepts, and what it needs after it to kill, sync and remount read-only.
_MOST_GRACE_S = 3600.0
_AGENT_S = 5.0
_SIGNALS = frozenset({"TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2", "ABRT"})


def check_signal(name: str) -> str:
    """A signal's bare name. Raises BangerError, bad_request, for any that is not allowed."""
    bare = name.upper().removeprefix("SIG")
    if bare not in _SIGNALS:
        raise BangerError(
            "bad_request",
            f"signal {name!r} is not allowed: one of {', '.join(sorted(_SIGNALS))}",
            hint="banger vm kill --help",
        )
    return bare


async def stop(
    ctx: VmContext,
    vm: VmRecord,
    *,
    timeout_s: float | None = None,
    untouched_since: str | None = None,
    last_error: str | None = None,
) -> tuple[VmRecord, str | None]:
    """Stop a VM; return its record and a sentence when there is something to say.

    The guest gets `timeout_s` (default: stop_timeout) to stop its services, sync and end the
    machine; then it is killed. With `untouched_since` one that was touched later is left running.
    `last_error` is why it stopped, where nobody asked for it.
    """
    async with ctx.locked(vm.id):
        vm = _reread(ctx, vm)
        if untouched_since is not None and vm.touched_at != untouched_since:
            return vm, None
        if not is_live(ctx, vm):
            if _is_idle(ctx, vm) and handles_of(ctx, vm.id) is None:
                return vm, f"VM {vm.name} was not running"
            return await reset(ctx, vm, last_error=vm.last_error), None
        note = await _end_gracefully(
            ctx, vm, ctx.settings.stop_timeout_s if timeout_s is None else timeout_s
        )
        return await reset(ctx, vm, last_error=last_error), note


async def _end_gracefully(ctx: VmContext, vm: VmRecord, grace_s: float) -> str | None:
    handles = ctx.handles[vm.id]
    assert handles.process is not None
    # Its watcher goes on until the reset: whatever keeps us from it, the end is noticed.
    if (await ctx.driver()).capabilities.emulated:
        grace_s *= 3
    grace_s = min(grace_s, _MOST_GRACE_S)
    try:
        async with step("stop.guest"):
            if vm.paused is not None:
                # Only a guest that runs can end in order.
                vm = await resume(ctx, vm)
            await ctx.client(vm).shutdown(grace_s=grace_s, connect_s=_CONNECT_S)
    except BangerError as e:
        log.warning("VM %s: the agent did not take the shutdown: %s", vm.name, e)
        return f"the agent of VM {vm.name} did not answer; it was killed, unsynced data may be lost"
    try:
        # Beyond the grace the agent ends everything itself, syncs, and reboots: that is its time.
        async with step("stop.exit"), asyncio.timeout(grace_s + _AGENT_S):
            await wait_exit(handles.process)
    except TimeoutError:
        return f"VM {vm.name} did not end within {grace_s:g} s and was killed"
    return None


async def kill(ctx: VmContext, vm: VmRecord, signal: str) -> tuple[VmRecord, str | None]:
    """Send a signal to the VMM and clean up; the state afterwards is `stopped`."""
    signal = check_signal(signal)
    async with ctx.locked(vm.id):
        vm = _reread(ctx, vm)
        if not is_live(ctx, vm) and _is_idle(ctx, vm):
            return vm, f"VM {vm.name} was not running"
        handles = handles_of(ctx, vm.id)
        if signal != "KILL" and handles is not None and handles.process is not None:
            signal_vmm(handles.process, signal, missing_ok=True)
            try:
                async with step("kill.signal"), asyncio.timeout(ctx.settings.stop_timeout_s):
                    await wait_exit(handles.process)
            except TimeoutError:
                log.info("VM %s outlived %s and is killed", vm.name, signal)
        return await reset(ctx, vm, last_error=None), None


async def delete(ctx: VmContext, vm: VmRecord, *, kill_it: bool = False) -> str | None:
    """Stop a VM and remove everything it had; return a sentence when there is something to say.

    `kill_it` skips the guest's own shutdown: nothing on its disks is wanted any more.

    Raises:
        BangerError: cleanup could not finish; the VM stays, in state error.
    """
    async with ctx.locked(vm.id):
        vm = _reread(ctx, vm)
        if not kill_it and is_live(ctx, vm):
            await _end_gracefully(ctx, vm, ctx.settings.stop_timeout_s)
        vm = await reset(ctx, vm, last_error=None)
        if vm.state == "error":
            raise BangerError(
                "operation_failed",
                f"deleting VM {vm.name}: {vm.last_error}",
                hint=f"banger vm delete {vm.name}",
            )
        await forget_vm(ctx, vm)
    return None


def _is_idle(ctx: VmContext, vm: VmRecord) -> bool:
    """Whether its record says that it does not run, and nothing says otherwise."""
    return vm.state in ("created", "stopped") and vm.id not in ctx.undecided


def _reread(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """The record as it is now that the lock is ours."""
    now = ctx.store.find(vm.id)
    if now is None:
        raise BangerError("not_found", f"VM {vm.name} is gone", hint="banger vm list")
    return now
