"""A host without a kernel: leases in memory, cgroups as directories that mean something.

`FakeHost` answers as `banger.host.host.Host` does and outlives the contexts that use it, as the
root helper's ledger outlives the daemon. Releasing a lease kills what is in its cgroup, as the real
one does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from banger.errors import BangerError
from banger.files import remove_tree
from banger.host.lease import (
    Bridge,
    BridgeStatus,
    HostStatus,
    LaunchPlan,
    Lease,
    LeaseId,
    LeasePlan,
    LeaseStatus,
    Swept,
)
from banger.host.privilege import Privilege
from banger.host.vmm_process import ProcessRef, kill_vmm
from fakes.faults import Faults
from patience import PATIENCE_S

ROOT = Privilege(kind="root")
NOBODY = Privilege(kind="none", missing="nobody may make a tap here")


class FakeHost:
    """Points: `host.prepare`, `host.prepare.reply` (made, then the answer is lost),
    `host.release`, `host.status`, `host.launch`, `host.launch.reply`."""

    def __init__(
        self,
        directory: Path,
        faults: Faults,
        privilege: Privilege = ROOT,
        *,
        launcher: Callable[[LaunchPlan], Awaitable[ProcessRef]] | None = None,
        jail_base: Path | None = None,
    ) -> None:
        self.privilege = privilege
        self.jail_base = jail_base
        self.processes: dict[LeaseId, ProcessRef] = {}
        """What was launched in a lease, by the helper."""
        self._launcher = launcher
        self.leases: dict[LeaseId, LeaseStatus] = {}
        self._cgroups = directory
        self._faults = faults
        self._plans: dict[LeaseId, LeasePlan] = {}

    async def prepare(self, plan: LeasePlan, *, op_id: str = "") -> Lease:
        self._require_privilege()
        await self._faults.arrive("host.prepare")
        lease_id = plan.lease_id
        known = self._plans.get(lease_id)
        taken = [s.vm_id for s in self.leases.values() if s.address == plan.guest_address]
        if known is not None and msgspec.structs.replace(known, nat=plan.nat) == plan:
            known = self._plans[lease_id] = plan
        if (known is not None and known != plan) or any(v != plan.vm_id for v in taken):
            raise BangerError("already_exists", f"{plan.guest_address} is leased", reason="in_use")
        if known is None:
            self._make(plan)
        await self._faults.arrive("host.prepare.reply")
        status = self.leases[lease_id]
        return Lease(id=lease_id, tap=status.tap, cgroup=status.cgroup)

    def _make(self, plan: LeasePlan) -> None:
        cgroup = self._cgroups / plan.vm_id
        cgroup.mkdir(parents=True)
        for name in ("cgroup.procs", "cgroup.kill"):
            (cgroup / name).touch()
        self._plans[plan.lease_id] = plan
        self.leases[plan.lease_id] = LeaseStatus(
            id=plan.lease_id,
            vm_id=plan.vm_id,
            tap=f"tap-fc-{plan.vm_id[:8]}",
            address=plan.guest_address,
            # What the installed helper makes of its own is of no use to the daemon, and not told.
            cgroup=None if plan.jail else str(cgroup),
            bridge=plan.bridge_name,
            state="ready",
        )

    def nat(self, lease_id: str) -> bool:
        """Whether the guest of this lease reaches the outside."""
        return self._plans[LeaseId(lease_id)].nat

    async def launch(self, plan: LaunchPlan, *, op_id: str = "") -> ProcessRef:
        await self._faults.arrive("host.launch")
        assert self._launcher is not None and self._plans[plan.id].jail
        ref = self.processes[plan.id] = await self._launcher(plan)
        await self._faults.arrive("host.launch.reply")
        return ref

    def refill(self, bridge: Bridge) -> None:
        """Taps cost nothing here."""

    async def release(self, lease_id: LeaseId, *, op_id: str = "") -> None:
        self._require_privilege()
        await self._faults.arrive("host.release")
        status = self.leases.pop(lease_id, None)
        plan = self._plans.pop(lease_id, None)
        if process := self.processes.pop(lease_id, None):
            await kill_vmm(process, None)
        if plan is not None and plan.jail and self.jail_base is not None:
            remove_tree(self.jail_base / "firecracker" / plan.vm_id)
        if status is not None:
            self._kill(self._cgroups / status.vm_id)

    def _kill(self, cgroup: Path) -> None:
        for word in (cgroup / "cgroup.procs").read_text().split():
            # A real cgroup forgets the dead; this one must not kill whoever has the number now.
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(int(word))
                try:
                    where = Path(os.readlink(f"/proc/{word}/cwd"))
                    if where.is_relative_to(self._cgroups.parent):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                        select.select([fd], [], [], PATIENCE_S)
                finally:
                    os.close(fd)
        remove_tree(cgroup)

    async def sweep(self, pool: Bridge | None = None) -> Swept:
        await self._faults.arrive("host.sweep")
        return Swept(removed=())

    async def status(self, *, op_id: str = "") -> HostStatus:
        self._require_privilege()
        await self._faults.arrive("host.status")
        bridges = tuple(
            BridgeStatus(name=name, address="", prefix=24, ports=())
            for name in sorted({s.bridge for s in self.leases.values()})
        )
        return HostStatus(
            version=1,
            leases=tuple(map(self._with_process, self.leases.values())),
            bridges=bridges,
            problems=(),
        )

    def _with_process(self, status: LeaseStatus) -> LeaseStatus:
        process = self.processes.get(status.id)
        if process is None:
            return status
        return msgspec.structs.replace(status, **msgspec.structs.asdict(process))

    async def aclose(self) -> None:
        """The helper ends; the leases stay."""

    def _require_privilege(self) -> None:
        if self.privilege.kind == "none":
            raise BangerError("operation_failed", self.privilege.missing, reason="unsupported")
