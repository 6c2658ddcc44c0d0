"""Cleanup: everything a launched VM holds on the host, given back. Idempotent, every step tried.

Stop, kill, delete, a failed start, a VMM that ended by itself and reconcile all come through here,
with the same handles.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.faults import step
from banger.files import remove_tree
from banger.host.lease import LeaseId
from banger.host.vmm_process import is_alive, kill_vmm
from banger.vm.handles import Handles, clear_handles, find_handles
from banger.vm.machines import find_machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)


def handles_of(ctx: VmContext, vm_id: str) -> Handles | None:
    """The VM's handles from memory, else from disk; damaged ones are none (the lease decides)."""
    with contextlib.suppress(BangerError):
        return ctx.handles.get(vm_id) or find_handles(ctx.vm_paths(vm_id))
    log.warning("the handles of VM %s are damaged", vm_id)
    return None


def is_live(ctx: VmContext, vm: VmRecord) -> bool:
    """The one decision whether a VM runs: its row says so and its process lives."""
    handles = ctx.handles.get(vm.id)
    return (
        vm.state == "running"
        and handles is not None
        and handles.process is not None
        and is_alive(handles.process)
    )


def as_it_is(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """The record, for people: one that says running of a machine that has ended says stopped.

    Whoever ends it, or its watcher, corrects the row when what it held has been given back; nobody
    who only looks waits for that. Of one that a call has just ended nobody says that it did so by
    itself.
    """
    if vm.state == "running" and not is_live(ctx, vm) and vm.id not in ctx.undecided:
        why = vm.last_error if ctx.is_locked(vm.id) else "the machine ended by itself"
        return msgspec.structs.replace(vm, state="stopped", boot_id=None, last_error=why)
    return vm


async def release_everything(ctx: VmContext, vm_id: str, handles: Handles | None) -> list[str]:
    """Kill what still runs, then give back lease, sockets and handles. Returns what failed.

    The lease goes only after the VMM's exit was seen: a tap that is reused while the old VMM is
    still dying swallows the new one's packets.
    """
    ctx.unwatch(vm_id)
    ctx.names.withdraw(vm_id)
    paths = ctx.vm_paths(vm_id)
    failures: list[str] = []

    async def attempt(name: str, what: str, work: Callable[[], Awaitable[object]]) -> bool:
        try:
            async with step(name):
                await work()
        except Exception as e:
            log.warning("cleanup of VM %s: %s: %s", vm_id[:8], what, e)
            failures.append(f"{what}: {e}")
            return False
        return True

    gone = True
    process = handles.process if handles is not None else None
    if process is None and paths.runtime.exists():
        # A daemon that was killed before it had written down what it had started.
        process = find_machine(paths)
    if process is not None:
        ending, cgroup = process, handles.cgroup if handles is not None else None
        gone = await attempt("release.process", "ending the VMM", lambda: kill_vmm(ending, cgroup))
    if gone:
        # Damaged handles: the ledger knows the lease by the VM's id.
        lease_id = handles.lease_id if handles is not None else LeaseId(vm_id)
        if lease_id is not None and ctx.host.privilege.kind != "none":
            await attempt(
                "release.lease", "releasing the lease", lambda: ctx.host.release(lease_id)
            )

        async def remove_sockets() -> None:
            remove_tree(paths.runtime)

        await attempt("release.sockets", "removing its sockets", remove_sockets)
    if not failures:

        async def forget_handles() -> None:
            clear_handles(paths)
            ctx.handles.pop(vm_id, None)
            ctx.admitted.discard(vm_id)
            ctx.undecided.pop(vm_id, None)

        await attempt("release.handles", "removing its handles", forget_handles)
    return failures


async def reset(ctx: VmContext, vm: VmRecord, *, last_error: str | None) -> VmRecord:
    """Bring a VM to `stopped` (or `error` when cleanup could not finish), whatever it was."""
    failures = await release_everything(ctx, vm.id, handles_of(ctx, vm.id))
    async with step("release.record"):
        if failures:
            return ctx.store.update(
                vm.id, state="error", last_error="; ".join(failures), boot_id=None, paused=None
            )
        return ctx.store.update(
            vm.id, state="stopped", last_error=last_error, boot_id=None, paused=None
        )
