"""The daemon's view of the host: leases and jailed launches through the root helper.

A `Host` is opened once and lives as long as the daemon; the helper behind it comes and goes.
Leases, and the VMMs that were launched in them, outlive both.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.host.helper import Calls, Helper, HelperService
from banger.host.lease import Bridge, HostStatus, LaunchPlan, Lease, LeaseId, LeasePlan, Swept
from banger.host.privilege import Privilege, find_helper, find_privilege
from banger.host.vmm_process import ProcessRef

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Nothing(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Host:
    """Leases of this user's VMs. All methods raise `BangerError` with the helper's own words."""

    def __init__(
        self,
        privilege: Privilege,
        helper: Calls | None,
        *,
        jail_base: Path | None = None,
        pool_size: int | None = None,
    ) -> None:
        self.privilege = privilege
        self.jail_base = jail_base
        """Where the helper makes jails; None where it launches nothing (user mode)."""
        self._helper = helper
        # None: there is no pool, and none to be ended (user mode).
        self._pool_size = pool_size
        self._filler: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        *,
        ledger: Path,
        log: Path | None = None,
        helper: Path | None = None,
        privilege: Privilege | None = None,
    ) -> Host:
        """Look once whether leases can be made here; the helper is started by the first call.

        `log` takes the helper's log lines (None: our own stderr); `helper` is the helper's
        directory or zip where it is not the one beside us; `privilege` what `find_privilege` said.
        """
        helper = helper or find_helper()
        if privilege is None:
            privilege = await find_privilege(helper)
        if privilege.kind == "none" or privilege.kind == "service":
            return cls(privilege, None)
        line = Helper(
            helper=helper, kind=privilege.kind, owner_uid=os.geteuid(), ledger=ledger, log=log
        )
        return cls(privilege, line)

    @classmethod
    def open_service(cls, socket: Path, *, jail_base: Path, pool_size: int) -> Host:
        """The installed helper (system mode): it is there, or each call says that it is not.

        `pool_size`: taps that it keeps in store, so that a start need not make one.
        """
        return cls(
            Privilege(kind="service"),
            HelperService(socket),
            jail_base=jail_base,
            pool_size=max(pool_size, 0),
        )

    async def prepare(self, plan: LeasePlan, *, op_id: str = "") -> Lease:
        """Make the lease of a VM, or return it where it is made already by the same plan.

        Raises:
            BangerError: nothing is left behind, unless the message says so. reason
                `subnet_overlap`, `in_use`, or `connection_lost`: call `release` to be sure.
        """
        params = {
            "vm_id": plan.vm_id,
            "bridge": msgspec.to_builtins(plan.bridge),
            "guest": {"address": plan.guest_address, "mac": plan.guest_mac},
            "isolate": plan.isolate,
            "announce_port": plan.announce_port,
            "nat": plan.nat,
            "guest_host_ports": plan.guest_host_ports,
            "limits": {"vcpu": plan.vcpu, "memory_mib": plan.memory_mib},
            "jail": plan.jail,
        }
        return await self._call("prepare", params, Lease, op_id)

    def refill(self, bridge: Bridge) -> None:
        """Let the next start find taps in store, in the background; one filler at a time."""
        if self._pool_size and (self._filler is None or self._filler.done()):
            self._filler = asyncio.create_task(self._refill(bridge))

    async def release(self, lease_id: LeaseId, *, op_id: str = "") -> None:
        """Give back everything the lease holds; its cgroup is killed first. Idempotent.

        Raises:
            BangerError: every step was tried; all failures are in the message.
        """
        await self._call("release", {"id": lease_id}, _Nothing, op_id)

    async def launch(self, plan: LaunchPlan, *, op_id: str = "") -> ProcessRef:
        """Start the jailed VMM of a lease; it answers on its API socket when this returns.

        Raises:
            BangerError: nothing runs then; reason `vmm_exited`: it ended at once, and its console
                says why; `connection_lost`: call `release` to be sure.
        """
        params = msgspec.to_builtins(plan)
        params["kernel"] = _resolve(plan.kernel)
        for drive in params["drives"]:
            drive["path"] = _resolve(drive["path"])
        return await self._call("launch", params, ProcessRef, op_id)

    async def signal(self, lease_id: LeaseId, name: str, *, op_id: str = "") -> None:
        """Send a signal by name to the VMM that was launched in a lease."""
        await self._call("signal", {"id": lease_id, "name": name}, _Nothing, op_id)

    async def sweep(self, pool: Bridge | None = None) -> Swept:
        """Release what a crash left half made, and leases unused for five minutes.

        `pool`: the bridge that gets its taps in store again.
        """
        wanted = None
        if pool is not None and self._pool_size is not None:
            wanted = {"bridge": msgspec.to_builtins(pool), "size": self._pool_size}
        return await self._call("sweep", {"pool": wanted}, Swept, "")

    async def set_resolver(self, link: str, server: str, domains: tuple[str, ...]) -> None:
        """Have the system's resolver ask `server` for these domains, by way of a bridge.

        Raises:
            BangerError: reason unsupported: systemd-resolved does not run here.
        """
        params = {"action": "set", "link": link, "server": server, "domains": domains}
        await self._call("resolver", params, _Nothing, "")

    async def clear_resolver(self, link: str) -> None:
        """Take back what `set_resolver` did."""
        params = {"action": "clear", "link": link, "server": "", "domains": ()}
        await self._call("resolver", params, _Nothing, "")

    async def status(self, *, op_id: str = "") -> HostStatus:
        """The leases of the ledger and their bridges."""
        return await self._call("status", {}, HostStatus, op_id)

    async def _refill(self, bridge: Bridge) -> None:
        try:
            await self.sweep(bridge)
        except BangerError as e:
            log.warning("the taps in store could not be filled up: %s", e)

    async def aclose(self) -> None:
        """End the helper. Leases and VMs stay."""
        if self._filler is not None:
            await asyncio.wait({self._filler})
        if self._helper is not None:
            await self._helper.aclose()

    async def _call(self, method: str, params: dict[str, Any], kind: type[T], op_id: str) -> T:
        if self._helper is None:
            raise BangerError(
                "operation_failed",
                f"asking the root helper to {method}: {self.privilege.missing}",
                hint=self.privilege.hint,
                reason="unsupported",
            )
        answer = await self._helper.call(method, params, op_id=op_id)
        try:
            return decode_json(answer, type=kind)
        except MALFORMED as e:
            raise BangerError(
                "operation_failed",
                f"asking the root helper to {method}: its answer is unreadable: {e}",
                hint="sudo banger system restart"
                if self.privilege.kind == "service"
                else "banger daemon stop",
            ) from e


def _resolve(path: str) -> str:
    """The helper follows no link; where a user's own image lies behind one, we do."""
    return str(Path(path).resolve())
