"""The plan of a start: every path, device, address and document, decided before anything is done.

Pure: the same inputs give the same plan. `vm.start` carries it out; tests and people read it.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.api.records import VmRecord
from banger.config.paths import VmPaths
from banger.guest.config import (
    AGENT_PORT,
    ANNOUNCE_PORT,
    GitIdentity,
    GuestConfig,
    Network,
    TcpTransport,
    VsockTransport,
)
from banger.guest.endpoint import Endpoint, TcpEndpoint, VsockEndpoint
from banger.host.lease import LaunchDrive, LaunchPlan, LeaseId, LeasePlan
from banger.vmm.machine import (
    USER_ANNOUNCE_ADDRESS,
    USER_GATEWAY,
    USER_GUEST_ADDRESS,
    USER_PREFIX,
    VSOCK_SOCKET,
    Capabilities,
    Drive,
    Machine,
    TapNic,
    UserNic,
)

if TYPE_CHECKING:
    from banger.api.records import ImageRecord, KernelRecord
    from banger.config.settings import Settings
    from banger.vm.handles import Secrets

_FIRST_CID = 1024
_MTU = 1500


class Jailing(msgspec.Struct, frozen=True, kw_only=True):
    """How VMMs are jailed here: where the helper makes jails, and with which programs."""

    base: Path
    firecracker_bin: Path
    jailer_bin: Path

    def root(self, vm_id: str) -> Path:
        """The directory that is `/` for a VMM; the jailer makes it from its program's name."""
        return self.base / "firecracker" / vm_id / "root"


class StartPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a start will do. `lease` is None on user-mode networking.

    `launch` is the helper's part for a jailed VMM; None where the daemon starts it itself.
    """

    vm: VmRecord
    paths: VmPaths
    lease: LeasePlan | None
    launch: LaunchPlan | None
    machine: Machine
    endpoint: Endpoint
    guest_config: GuestConfig
    base_initrd: str
    announce_path: Path | None
    ready_timeout_s: float

    def with_tap(self, tap: str) -> StartPlan:
        """The same start on the tap that the lease came with: a pool's taps have other names."""
        nic = TapNic(tap=tap, mac=self.vm.mac)
        return msgspec.structs.replace(self, machine=msgspec.structs.replace(self.machine, nic=nic))


def tap_name(vm_id: str) -> str:
    return f"tap-fc-{vm_id[:8]}"


def build_start_plan(
    *,
    vm: VmRecord,
    paths: VmPaths,
    image: ImageRecord,
    kernel: KernelRecord,
    secrets: Secrets,
    settings: Settings,
    capabilities: Capabilities,
    authorized_keys: tuple[str, ...],
    git_identity: GitIdentity | None,
    agent_host_port: int | None,
    jailing: Jailing | None,
    uplink_mtu: int | None,
    now_unix_ns: int,
) -> StartPlan:
    """Decide everything about one start.

    `agent_host_port`: a free loopback port, for the user network only. `uplink_mtu`: what packets
    to the outside may have, in bytes.
    """
    bridged = vm.network == "bridge"
    # Everything that the VMM opens by name lies here, as the daemon sees it.
    runtime = paths.runtime if jailing is None else jailing.root(vm.id)
    mtu = min(_MTU, uplink_mtu) if vm.nat and uplink_mtu else _MTU
    network = (
        Network(
            mac=vm.mac,
            address=vm.address,
            prefix=settings.cidr,
            gateway=settings.bridge_ip,
            mtu=mtu,
            dns=settings.default_dns,
        )
        if bridged
        else Network(
            mac=vm.mac,
            address=USER_GUEST_ADDRESS,
            prefix=USER_PREFIX,
            gateway=USER_GATEWAY,
            mtu=mtu,
            dns=settings.default_dns,
        )
    )
    endpoint: Endpoint
    transport: VsockTransport | TcpTransport
    announce_path: Path | None = None
    cid: int | None = None
    # QEMU's vhost-vsock would share one space of CIDs with everybody on the host: TCP serves there.
    if capabilities.vsock == "unix":
        transport = VsockTransport()
        vsock = runtime / VSOCK_SOCKET
        endpoint = VsockEndpoint(path=str(vsock), port=AGENT_PORT)
        announce_path = vsock.with_name(f"{vsock.name}_{ANNOUNCE_PORT}")
        host_number = int(ipaddress.IPv4Address(vm.address)) & ~int(settings.subnet.netmask)
        cid = _FIRST_CID + host_number
    elif bridged:
        transport = TcpTransport(
            announce=f"{settings.bridge_ip}:{ANNOUNCE_PORT}", peer=settings.bridge_ip
        )
        endpoint = TcpEndpoint(address=vm.address, port=AGENT_PORT)
    else:
        assert agent_host_port is not None
        transport = TcpTransport(
            announce=f"{USER_ANNOUNCE_ADDRESS}:{ANNOUNCE_PORT}", peer=USER_GATEWAY
        )
        endpoint = TcpEndpoint(address="127.0.0.1", port=agent_host_port)
        announce_path = paths.announce_socket
    nic: TapNic | UserNic
    if bridged:
        nic = TapNic(tap=tap_name(vm.id), mac=vm.mac)
    else:
        assert agent_host_port is not None
        nic = UserNic(
            mac=vm.mac,
            agent_port=agent_host_port,
            announce_socket=paths.announce_socket,
            nat=vm.nat,
        )
    drives = (
        Drive(role="image", path=Path(image.rootfs_path), read_only=True),
        Drive(role="overlay", path=paths.overlay, read_only=False),
        Drive(role="work", path=paths.work, read_only=False),
        Drive(role="modules", path=Path(kernel.modules), read_only=True),
    )
    return StartPlan(
        vm=vm,
        paths=paths,
        lease=build_lease_plan(vm, settings, jail=jailing is not None) if bridged else None,
        launch=build_launch_plan(vm, paths, drives, kernel, jailing) if jailing else None,
        machine=Machine(
            vm_id=vm.id,
            vcpu=vm.vcpu,
            memory_mib=vm.memory_mib,
            kernel=Path(kernel.vmlinux),
            initrd=paths.initrd,
            drives=drives,
            nic=nic,
            vsock_cid=cid,
            runtime=runtime,
            jailed=jailing is not None,
        ),
        endpoint=endpoint,
        guest_config=GuestConfig(
            vm_id=vm.id,
            name=vm.name,
            hostname=vm.name,
            network=network,
            transport=transport,
            time_unix_ns=now_unix_ns,
            token=secrets.token,
            authorized_keys=authorized_keys,
            host_key=secrets.host_key,
            host_key_pub=secrets.host_key_pub,
            install_sshd=image.install_sshd and vm.nat and not vm.building,
            image_config=image.oci,
            git_identity=git_identity,
        ),
        base_initrd=kernel.initrd,
        announce_path=announce_path,
        ready_timeout_s=settings.ready_timeout_s * (3 if capabilities.emulated else 1),
    )


def build_lease_plan(vm: VmRecord, settings: Settings, *, jail: bool) -> LeasePlan:
    """What a VM on the bridge asks of the host."""
    return LeasePlan(
        vm_id=vm.id,
        bridge_name=settings.bridge_name,
        bridge_address=settings.bridge_ip,
        bridge_prefix=settings.cidr,
        guest_address=vm.address,
        isolate=settings.vm_isolation,
        announce_port=ANNOUNCE_PORT,
        guest_host_ports=settings.guest_host_ports,
        nat=vm.nat,
        vcpu=vm.vcpu,
        memory_mib=vm.memory_mib,
        jail=jail,
    )


def build_launch_plan(
    vm: VmRecord,
    paths: VmPaths,
    drives: tuple[Drive, ...],
    kernel: KernelRecord,
    jailing: Jailing,
) -> LaunchPlan:
    """What the helper opens, binds into the jail and starts."""
    return LaunchPlan(
        id=LeaseId(vm.id),
        firecracker_bin=str(jailing.firecracker_bin),
        jailer_bin=str(jailing.jailer_bin),
        kernel=kernel.vmlinux,
        initrd=str(paths.initrd),
        drives=tuple(LaunchDrive(role=d.role, path=str(d.path)) for d in drives),
        console=str(paths.console),
    )
