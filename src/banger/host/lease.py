"""What a VM asks of the host's network, and what it gets."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Literal, NewType

import msgspec

LeaseId = NewType("LeaseId", str)


class Bridge(msgspec.Struct, frozen=True, kw_only=True):
    """The bridge that guests are on: its name, and the host's address there."""

    name: str
    address: str
    prefix: int


class LeasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the helper needs to know of one VM.

    `isolate`: no frames to or from other guests. `announce_port`: the TCP port on the bridge's
    address that the guest may reach, beside those of `guest_host_ports`. `vcpu` and `memory_mib`
    bound its cgroup. `jail`: the VMM will be launched by the helper, in a chroot.
    """

    vm_id: str
    bridge_name: str
    bridge_address: str
    bridge_prefix: int
    guest_address: str
    isolate: bool
    announce_port: int
    nat: bool = False
    guest_host_ports: tuple[int, ...] = ()
    vcpu: int
    memory_mib: int
    jail: bool = False

    @property
    def lease_id(self) -> LeaseId:
        """Known before `prepare` is called, so that its undo can be registered first."""
        return LeaseId(self.vm_id)

    @property
    def bridge(self) -> Bridge:
        return Bridge(name=self.bridge_name, address=self.bridge_address, prefix=self.bridge_prefix)

    @property
    def guest_mac(self) -> str:
        return derive_mac(self.guest_address)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM holds. `cgroup` is None where there is none that the daemon may use.

    `jail` is the root directory of the jail that `launch` will use.
    """

    id: LeaseId
    tap: str
    cgroup: str | None
    jail: str | None = None


class LaunchDrive(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a jailed VM; the helper knows by the role whether it is read-only."""

    role: Literal["image", "overlay", "work", "modules"]
    path: str


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a jailed VMM is started from; every path is absolute and opened by the helper."""

    id: LeaseId
    firecracker_bin: str
    jailer_bin: str
    kernel: str
    initrd: str
    drives: tuple[LaunchDrive, ...]
    console: str


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody else's packet filter that drops what guests with NAT send."""

    family: str
    table: str
    chain: str
    why: str
    command: str


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep removed, and how many taps are in store afterwards."""

    removed: tuple[str, ...]
    pooled: int = 0


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One lease in the ledger. `state`: `making`, `ready` or `releasing`.

    `pid`, `start_time` and `boot_id` are of what the helper launched in it, which may have ended
    since.
    """

    id: LeaseId
    vm_id: str
    tap: str
    address: str
    cgroup: str | None
    bridge: str
    state: str
    pid: int | None = None
    start_time: int | None = None
    boot_id: str | None = None


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
    obstacles: tuple[Obstacle, ...] = ()


def derive_mac(address: str) -> str:
    """The MAC of a guest: `06:00:` and the four bytes of its IPv4 address (spec 6.1)."""
    return "06:00:" + IPv4Address(address).packed.hex(":")
