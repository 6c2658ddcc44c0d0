"""What a VM asks of the host's network, and what it gets."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import NewType

import msgspec

LeaseId = NewType("LeaseId", str)


class LeasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the helper needs to know of one VM.

    `isolate`: no frames to or from other guests. `announce_port`: the TCP port on the bridge's
    address that the guest may reach.
    """

    vm_id: str
    bridge_name: str
    bridge_address: str
    bridge_prefix: int
    guest_address: str
    isolate: bool
    announce_port: int

    @property
    def lease_id(self) -> LeaseId:
        """Known before `prepare` is called, so that its undo can be registered first."""
        return LeaseId(self.vm_id)

    @property
    def guest_mac(self) -> str:
        return derive_mac(self.guest_address)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM holds. `cgroup` is None where there is none that the daemon may use."""

    id: LeaseId
    tap: str
    cgroup: str | None


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One lease in the ledger. `state`: `making`, `ready` or `releasing`."""

    id: LeaseId
    vm_id: str
    tap: str
    address: str
    cgroup: str | None
    bridge: str
    state: str


class BridgeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One bridge of the ledger's leases that exists."""

    name: str
    address: str
    prefix: int
    ports: tuple[str, ...]


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the helper knows. `problems`: ledger files that cannot be read."""

    version: int
    leases: tuple[LeaseStatus, ...]
    bridges: tuple[BridgeStatus, ...]
    problems: tuple[str, ...]


def derive_mac(address: str) -> str:
    """The MAC of a guest: `06:00:` and the four bytes of its IPv4 address (spec 6.1)."""
    return "06:00:" + IPv4Address(address).packed.hex(":")
