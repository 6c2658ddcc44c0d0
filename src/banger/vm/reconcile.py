"""Reconcile: rows, handles, leases and machines made to agree, when a daemon starts and on demand.

A machine that is alive is never touched: it is adopted, also where its handles are lost and only
the ledger or its working directory tells whose it is. What a crash left over is given back. What
cannot be decided is left as it is, and told: in the log, by `banger doctor`, in the VM's record.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec.structs import replace

from banger.api.doctor import Undecided
from banger.errors import BangerError
from banger.files import remove_tree
from banger.host.vmm_process import is_alive
from banger.names import short_id
from banger.vm.cleanup import handles_of, is_live, release_everything, reset
from banger.vm.create import ASIDE, forget_vm
from banger.vm.handles import write_handles
from banger.vm.machines import (
    ask,
    began_after,
    find_in_lease,
    find_machines,
    living,
    rebuild_handles,
)
from banger.vm.start import watch
from banger.vm.threads import finish_in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from banger.api.records import VmRecord
    from banger.host.lease import LeaseStatus
    from banger.host.vmm_process import ProcessRef
    from banger.vm.context import VmContext
    from banger.vm.handles import Handles

log = logging.getLogger(__name__)

Level = Literal["WARN", "FAIL"]
_VM_ID = re.compile(r"[0-9a-f]{32}")
_SHORT_ID = re.compile(r"[0-9a-f]{12}")


class Reconciled(NamedTuple):
    """One sentence for each thing that was done, and for each that could not be."""

    did: tuple[str, ...]
    failures: tuple[str, ...]


async def reconcile(ctx: VmContext) -> Reconciled:
    """Adopt what lives, give back what nobody uses; `ctx.undecided` has what is neither.

    VMs with an operation under way are left to it. Never raises for what is found: failures are
    logged, and stay in the record.
    """
    run = _Reconciliation(ctx)
    await run.everything()
    return Reconciled(tuple(run.did), tuple(run.failures))


class _Reconciliation:
    """One comparison. `leases` is None while the helper does not answer."""

    def __init__(self, ctx: VmContext) -> None:
        self.ctx = ctx
        self.did: list[str] = []
        self.failures: list[str] = []
        self.leases: dict[str, LeaseStatus] | None = {}
        self.machines: dict[str, ProcessRef] = {}
        self.given: set[str] = set()

    async def everything(self) -> None:
        ctx = self.ctx
        # Before the rows are read: a row is there before its directories, and goes after them.
        directories = [p for p in _list(ctx.paths.vms) if _VM_ID.fullmatch(p.name)]
        sockets = [p for p in _list(ctx.paths.runtime / "vms") if _SHORT_ID.fullmatch(p.name)]
        await self._read_leases()
        self.machines = find_machines(ctx.paths.runtime / "vms")
        for vm in ctx.store.list():
            await self._in_turn(vm.id)
        for aside in _list(ctx.paths.vms):
            vm_id = aside.name.removeprefix(ASIDE)
            # With the VM's lock held, its delete is just removing it.
            if vm_id != aside.name and not ctx.is_locked(vm_id) and ctx.store.find(vm_id) is None:
                await self._remove(aside, f"removed what was left of a deleted VM in {aside}")
        rows = {vm.id for vm in ctx.store.list()}
        for vm_id in ctx.undecided.keys() - rows:
            del ctx.undecided[vm_id]
        for directory in directories:
            if directory.name not in rows and directory.exists():
                await self._directory_without_a_vm(directory)
        short = {vm_id[:12] for vm_id in rows}
        for path in sockets:
            if path.name not in short and path.exists():
                await self._sockets_without_a_vm(path)
        await self._release_unused(rows)

    def _tell(self, what: str) -> None:
        log.warning("%s", what)
        self.did.append(what)

    def _fail(self, what: str, failures: list[str]) -> None:
        if failures:
            self.failures.append(f"{what}: {'; '.join(failures)}")

    async def _remove(self, path: Path, done: str) -> None:
        """Remove a directory of nobody's; one that cannot be (of root's, say) is told."""
        try:
            await finish_in_thread(remove_tree, path)
        except OSError as e:
            log.warning("removing %s: %s", path, e)
            self._fail(f"removing {path}", [e.strerror or str(e)])
        else:
            self._tell(done)

    async def _give_back(self, vm_id: str, handles: Handles | None) -> list[str]:
        self.given.add(vm_id)
        return await release_everything(self.ctx, vm_id, handles)

    def _machine(self, vm_id: str) -> ProcessRef | None:
        process = find_in_lease((self.leases or {}).get(vm_id)) or self.machines.get(vm_id[:12])
        return process if process is not None and is_alive(process) else None

    def _leave(self, vm_id: str, what: str, command: str, level: Level = "FAIL") -> None:
        log.error("%s; %s", what, command)
        self.ctx.undecided[vm_id] = Undecided(what=what, command=command, level=level)

    async def _read_leases(self) -> None:
        if self.ctx.host.privilege.kind == "none":
            return
        try:
            found = (await self.ctx.host.status()).leases
        except BangerError as e:
            log.warning("leases cannot be compared: %s", e)
            self.leases = None
        else:
            self.leases = {lease.vm_id: lease for lease in found}

    async def _in_turn(self, vm_id: str) -> None:
        if self.ctx.is_locked(vm_id):
            return
        async with self.ctx.locked(vm_id):
            vm = self.ctx.store.find(vm_id)
            if vm is None:
                return
            try:
                await self._one(vm)
            except (BangerError, OSError) as e:
                log.warning("reconciling VM %s: %s", vm.name, e)
                self._fail(f"VM {vm.name}", [str(e)])

    async def _one(self, vm: VmRecord) -> None:
        ctx = self.ctx
        if is_live(ctx, vm):
            return
        lease = (self.leases or {}).get(vm.id)
        handles = handles_of(ctx, vm.id)
        process = living(handles) or self._machine(vm.id)
        ctx.undecided.pop(vm.id, None)
        if not (vm.provisional or vm.building) and not ctx.vm_paths(vm.id).directory.exists():
            await self._without_files(vm, process)
        elif process is None:
            await self._without_a_machine(vm, handles, lease)
        elif vm.provisional or vm.building or vm.state == "error":
            # A create that nobody was told of, or a build's machine; a cleanup that its user wanted
            # and that failed.
            await self._roll_back(vm, _with_process(handles, process))
        else:
            await self._with_a_machine(vm, handles, lease, process)

    async def _with_a_machine(
        self,
        vm: VmRecord,
        handles: Handles | None,
        lease: LeaseStatus | None,
        process: ProcessRef,
    ) -> None:
        ctx = self.ctx
        known = _with_process(handles, process) or await rebuild_handles(ctx, vm, lease, process)
        if vm.state == "running" and known is not None:
            adopt(ctx, vm, known)
            if known != handles:
                write_handles(ctx.vm_paths(vm.id), known)
                self._tell(f"VM {vm.name} runs on; what it holds was recorded anew")
            return
        kill = f"banger vm kill {vm.name}"
        if vm.state == "running":
            silent = "its handles are lost, and the root helper does not answer"
            why = silent if self.leases is None else "its handles are lost"
            self._leave(
                vm.id,
                f"VM {vm.name} runs (pid {process.pid}), but what it holds is not known: {why}",
                kill,
            )
            return
        health = await ask(ctx, vm, known) if known is not None else None
        if health is not None and known is not None:
            # The start's daemon died, or the record is an older one: the guest works all the same.
            vm = ctx.store.update(vm.id, state="running", boot_id=health.boot_id, last_error=None)
            write_handles(ctx.vm_paths(vm.id), known)
            adopt(ctx, vm, known)
            self._tell(f"VM {vm.name} was recorded as not running, but runs: it is running now")
        elif began_after(process, vm.updated_at):
            # A start that died half-way: nobody was told of it.
            await self._roll_back(vm, known)
        else:
            self._leave(
                vm.id,
                f"a machine of VM {vm.name} runs (pid {process.pid}) although the VM is recorded "
                f"as {vm.state}, and its guest does not answer",
                kill,
            )

    async def _without_a_machine(
        self, vm: VmRecord, handles: Handles | None, lease: LeaseStatus | None
    ) -> None:
        ctx = self.ctx
        if vm.state == "running" and handles is None and self.leases is None:
            # In its jail only the helper sees it.
            self._leave(
                vm.id,
                f"whether VM {vm.name} runs is not known: its handles are lost, and the root "
                "helper does not answer",
                "banger doctor --fix",
            )
        elif vm.state == "running" and not vm.building:
            log.warning("VM %s ended while no daemon ran", vm.name)
            self.given.add(vm.id)
            vm = await reset(ctx, vm, last_error="the machine ended while no daemon was running")
            self._fail(f"VM {vm.name}", [vm.last_error or ""] if vm.state == "error" else [])
            self._tell(f"VM {vm.name} does not run: its machine had ended")
        elif (
            vm.provisional
            or vm.building
            or vm.state == "error"
            or handles is not None
            or lease is not None
            or ctx.vm_paths(vm.id).handles.exists()
            or ctx.vm_paths(vm.id).runtime.exists()
        ):
            await self._roll_back(vm, handles)

    async def _without_files(self, vm: VmRecord, process: ProcessRef | None) -> None:
        ctx = self.ctx
        if process is not None:
            self._leave(
                vm.id,
                f"VM {vm.name} runs (pid {process.pid}), but its directory is gone",
                f"banger vm delete {vm.name}",
            )
        elif (ctx.paths.vms / f"{ASIDE}{vm.id}").exists():
            # Killed in the middle of a delete, which its user had asked for.
            failures = await self._give_back(vm.id, None)
            self._fail(f"VM {vm.name}", failures)
            if failures:
                ctx.store.update(vm.id, state="error", last_error="; ".join(failures))
            else:
                await forget_vm(ctx, vm)
                self._tell(f"VM {vm.name} is deleted, as had been begun")
        else:
            self._leave(
                vm.id,
                f"the directory of VM {vm.name} is gone, with its disks",
                f"banger vm delete {vm.name}",
            )

    async def _roll_back(self, vm: VmRecord, handles: Handles | None) -> None:
        ctx = self.ctx
        failures = await self._give_back(vm.id, handles)
        self._fail(f"VM {vm.name}", failures)
        if failures:
            ctx.store.update(vm.id, state="error", last_error="; ".join(failures))
        elif vm.provisional or vm.building:
            if vm.state == "running":
                vm = ctx.store.update(vm.id, state="stopped", boot_id=None)
            await forget_vm(ctx, vm)
            what = "build" if vm.building else "create"
            self._tell(f"VM {vm.name} is removed: its {what} had not ended")
        else:
            if vm.state == "error":
                ctx.store.update(vm.id, state="stopped")
            self._tell(f"gave back what VM {vm.name} held, which does not run")

    async def _directory_without_a_vm(self, directory: Path) -> None:
        """Its row went after it, if banger removed it: so this one was lost with its database."""
        ctx, vm_id = self.ctx, directory.name
        handles = handles_of(ctx, vm_id)
        process = living(handles) or self._machine(vm_id)
        if process is not None:
            self._leave(
                vm_id,
                f"a machine (pid {process.pid}) runs in {directory}, which belongs to no VM",
                f"kill {process.pid}",
            )
            return
        failures = await self._give_back(vm_id, handles)
        self._fail(f"{directory}", failures)
        if failures:
            return  # what still holds something keeps its handles for the next time
        if ctx.vm_paths(vm_id).work.exists():
            self._leave(
                vm_id,
                f"{directory} belongs to no VM, but holds disks that somebody may want",
                f"rm -r {directory}",
                "WARN",
            )
        else:
            await self._remove(
                directory, f"removed the directory {directory}, which belonged to no VM"
            )

    async def _sockets_without_a_vm(self, path: Path) -> None:
        process = self.machines.get(path.name)
        if process is None or not is_alive(process):
            await self._remove(path, f"removed the sockets in {path}, which belonged to no VM")
        elif not any(vm_id.startswith(path.name) for vm_id in self.ctx.undecided):
            self._leave(
                path.name,
                f"a machine (pid {process.pid}) runs in {path}, which belongs to no VM",
                f"kill {process.pid}",
            )

    async def _release_unused(self, rows: set[str]) -> None:
        """Leases of no VM that holds anything."""
        ctx = self.ctx
        for lease in (self.leases or {}).values():
            vm_id = lease.vm_id
            if vm_id in self.given or ctx.is_locked(vm_id):
                continue
            # A start holds this lock from before its lease until its handles are known.
            async with ctx.locked(vm_id):
                if vm_id in ctx.handles or vm_id in ctx.undecided:
                    continue
                if (process := self._machine(vm_id)) is not None:
                    if vm_id not in rows:
                        self._leave(
                            vm_id,
                            f"a machine (pid {process.pid}) runs with a lease of no VM "
                            f"({short_id(vm_id)})",
                            f"kill {process.pid}",
                        )
                    continue
                try:
                    await ctx.host.release(lease.id)
                except BangerError as e:
                    log.warning("lease %s belongs to no running VM: %s", lease.id, e)
                    self._fail(f"the lease of {_whose(ctx, vm_id)}", [str(e)])
                else:
                    self._tell(f"released the lease of {_whose(ctx, vm_id)}")


def adopt(ctx: VmContext, vm: VmRecord, handles: Handles) -> None:
    """Take over a running VM: handles in memory, its end watched, its name known."""
    assert handles.process is not None
    ctx.undecided.pop(vm.id, None)
    ctx.handles[vm.id] = handles
    ctx.watch(vm.id, watch(ctx, vm.id, handles.process))
    ctx.names.publish(vm)
    log.info("VM %s runs on (pid %d)", vm.name, handles.process.pid)


def _with_process(handles: Handles | None, process: ProcessRef) -> Handles | None:
    return replace(handles, process=process) if handles is not None else None


def _whose(ctx: VmContext, vm_id: str) -> str:
    vm = ctx.store.find(vm_id)
    return f"VM {vm.name}, which does not run" if vm else f"no VM ({short_id(vm_id)})"


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
