"""The daemon's view of the host: leases through the root helper.

A `Host` is opened once and lives as long as the daemon; the helper behind it comes and goes.
Leases outlive both.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from banger.errors import BangerError
from banger.host.helper import Helper
from banger.host.lease import HostStatus, Lease, LeaseId, LeasePlan
from banger.host.privilege import Privilege, find_helper, find_privilege

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


class _Nothing(msgspec.Struct, frozen=True, kw_only=True):
    pass


class _Removed(msgspec.Struct, frozen=True, kw_only=True):
    removed: tuple[LeaseId, ...]


class Host:
    """Leases of this user's VMs. All methods raise `BangerError` with the helper's own words."""

    def __init__(self, privilege: Privilege, helper: Helper | None) -> None:
        self.privilege = privilege
        self._helper = helper

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
        if privilege.kind == "none":
            return cls(privilege, None)
        line = Helper(
            helper=helper, kind=privilege.kind, owner_uid=os.geteuid(), ledger=ledger, log=log
        )
        return cls(privilege, line)

    async def prepare(self, plan: LeasePlan, *, op_id: str = "") -> Lease:
        """Make the lease of a VM, or return it where it is made already by the same plan.

        Raises:
            BangerError: nothing is left behind, unless the message says so. reason
                `subnet_overlap`, `in_use`, or `connection_lost`: call `release` to be sure.
        """
        params = {
            "vm_id": plan.vm_id,
            "bridge": {
                "name": plan.bridge_name,
                "address": plan.bridge_address,
                "prefix": plan.bridge_prefix,
            },
            "guest": {"address": plan.guest_address, "mac": plan.guest_mac},
            "isolate": plan.isolate,
            "announce_port": plan.announce_port,
        }
        return await self._call("prepare", params, Lease, op_id)

    async def release(self, lease_id: LeaseId, *, op_id: str = "") -> None:
        """Give back everything the lease holds; its cgroup is killed first. Idempotent.

        Raises:
            BangerError: every step was tried; all failures are in the message.
        """
        await self._call("release", {"id": lease_id}, _Nothing, op_id)

    async def sweep(self, *, op_id: str = "") -> tuple[LeaseId, ...]:
        """Release what a crash left half made, and leases unused for five minutes; their ids."""
        return (await self._call("sweep", {}, _Removed, op_id)).removed

    async def status(self, *, op_id: str = "") -> HostStatus:
        """The leases of the ledger and their bridges."""
        return await self._call("status", {}, HostStatus, op_id)

    async def aclose(self) -> None:
        """End the helper. Leases and VMs stay."""
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
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as e:
            raise BangerError(
                "operation_failed",
                f"asking the root helper to {method}: its answer is unreadable: {e}",
                hint="banger daemon stop",
            ) from e
