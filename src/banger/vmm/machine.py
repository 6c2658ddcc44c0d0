"""What a VMM is asked to run, as values: decided once in the plan, printed, compared, then used.

Nothing here touches the host. Every name of a file below a VM's runtime directory that a VMM makes
or opens is a constant of this module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

Role = Literal["image", "overlay", "work", "modules"]
ROLES: tuple[Role, ...] = ("image", "overlay", "work", "modules")
# How the host reaches the guest's vsock: a Unix socket of the VMM, or the host kernel's AF_VSOCK.
VsockKind = Literal["unix", "host"]

API_SOCKET = "api.sock"
VSOCK_SOCKET = "vsock.sock"

# The guest's side of user-mode networking; QEMU's defaults, stated because the guest's
# configuration document has to name them too.
USER_GUEST_ADDRESS = "10.0.2.15"
USER_GATEWAY = "10.0.2.2"
USER_PREFIX = 24
USER_DNS = "10.0.2.3"
USER_ANNOUNCE_ADDRESS = "10.0.2.100"
AGENT_PORT = 7000
ANNOUNCE_PORT = 7001

# Linux's COMMAND_LINE_SIZE on x86 is 2048 with the final NUL.
_MAX_ARGS = 2047
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Drive(msgspec.Struct, frozen=True, kw_only=True):
    """One virtio block device. Its place among the machine's drives makes it vda, vdb, …"""

    role: Role
    path: Path
    read_only: bool


class TapNic(msgspec.Struct, frozen=True, kw_only=True):
    """A network card on a tap that exists already and that this user may open."""

    tap: str
    mac: str

    def __post_init__(self) -> None:
        _check_mac(self.mac)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", self.tap):
            raise ValueError(f"tap name {self.tap!r} is no interface name of up to 15 characters")


class UserNic(msgspec.Struct, frozen=True, kw_only=True):
    """A network card on QEMU's own user-mode stack, for hosts where nobody may make a tap.

    `agent_port` of 127.0.0.1 leads to the agent's port 7000 in the guest. A guest connection to
    10.0.2.100:7001 arrives at the Unix socket `announce_socket`, which should be listening before
    the launch. Without `nat` nothing else leaves the guest.
    """

    mac: str
    agent_port: int
    announce_socket: Path
    nat: bool = False

    def __post_init__(self) -> None:
        _check_mac(self.mac)
        if not 1 <= self.agent_port <= 65535:
            raise ValueError(f"agent_port {self.agent_port} is no TCP port")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One microVM. `runtime` is the VMM's working directory and holds its sockets.

    `jailed`: it is all that the VMM sees, and its files are there under their names already.
    """

    vm_id: str
    vcpu: int
    memory_mib: int
    kernel: Path
    initrd: Path
    drives: tuple[Drive, ...]
    nic: TapNic | UserNic | None
    vsock_cid: int | None
    runtime: Path
    jailed: bool = False
    kernel_args_extra: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{32}", self.vm_id):
            raise ValueError(f"vm_id {self.vm_id!r} is not 32 hex digits")
        if not 1 <= self.vcpu <= 32:
            raise ValueError(f"vcpu is {self.vcpu}, must be 1 to 32")
        if self.memory_mib < 128:
            raise ValueError(f"memory_mib is {self.memory_mib}, must be 128 or more")
        if tuple(d.role for d in self.drives) not in (ROLES, ROLES[:3]):
            raise ValueError(f"drives must be {', '.join(ROLES)} in this order (modules optional)")
        # CIDs 0 to 2 are the hypervisor's, the local machine's and the host's (vsock(7)).
        if self.vsock_cid is not None and not 3 <= self.vsock_cid < 0xFFFFFFFF:
            raise ValueError(f"vsock_cid is {self.vsock_cid}, must be 3 or more")
        for path in (self.kernel, self.initrd, self.runtime, *(d.path for d in self.drives)):
            if not path.is_absolute() or "\0" in str(path):
                raise ValueError(f"{path} is no absolute path")


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How the VMM's process is started: stdin /dev/null, stdout and stderr to the console log."""

    argv: tuple[str, ...]
    cwd: Path


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a driver can do on this host.

    `vsock` is None where the agent is reached over TCP. `emulated`: no hardware virtualisation, so
    waits are three times as long. `user_network`: it works without a tap. `copies_initrd`: one
    that has started needs the file no more (QEMU maps it as long as it lives).
    """

    vsock: VsockKind | None
    snapshot: bool
    emulated: bool
    user_network: bool
    copies_initrd: bool = False


def build_kernel_args(
    machine: Machine, *driver_args: str, reboot: Literal["acpi", "keyboard"]
) -> str:
    """The kernel command line: the same for every guest, then the driver's, then the caller's.

    `reboot` is the way in which this VMM hears of a guest's reboot, which ends it.

    Raises:
        ValueError: it is not printable ASCII, or longer than the kernel reads.
    """
    base = f"console=ttyS0 reboot={reboot[0]} panic=-1 quiet rdinit=/init"
    args = " ".join(filter(None, (base, *driver_args, machine.kernel_args_extra)))
    if not (args.isascii() and args.isprintable()):
        raise ValueError("kernel arguments must be printable ASCII")
    if len(args) > _MAX_ARGS:
        raise ValueError(f"kernel arguments have {len(args)} characters, {_MAX_ARGS} at most")
    return args


def _check_mac(mac: str) -> None:
    if not _MAC.fullmatch(mac):
        raise ValueError(f"{mac!r} is no MAC address in lower case")
