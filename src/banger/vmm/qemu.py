"""The QEMU driver: `-M microvm`, KVM where it works, else emulation. Same guest, only slower.

QEMU is configured by its command line alone and starts its guest by itself; its monitor in the
runtime directory is used to see that it is up, and to pause and resume. What was measured, and why
each option is as it is: docs/vmm.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from banger.errors import BangerError
from banger.vmm import qmp
from banger.vmm.driver import before_exit, wait_for_socket
from banger.vmm.machine import (
    AGENT_PORT,
    ANNOUNCE_PORT,
    API_SOCKET,
    USER_ANNOUNCE_ADDRESS,
    USER_DNS,
    USER_GATEWAY,
    USER_GUEST_ADDRESS,
    USER_PREFIX,
    Capabilities,
    Drive,
    Launch,
    Machine,
    TapNic,
    UserNic,
    build_kernel_args,
)

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from banger.api.records import VmmName

Accel = Literal["kvm", "tcg"]
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_REQUEST_TIMEOUT_S = 15.0


class QemuDriver:
    """Runs a `Machine` under qemu-system-x86_64.

    `tsc_khz` is the frequency of this host's time stamp counter, which emulated guests see;
    None when it could not be measured. `sandbox`: this build has seccomp filters.
    """

    def __init__(
        self,
        *,
        program: Path,
        version: str,
        accel: Accel,
        sandbox: bool,
        vhost_vsock: bool,
        tsc_khz: int | None,
    ) -> None:
        self.program = program
        self.version = version
        self.accel = accel
        self.sandbox = sandbox
        self.vhost_vsock = vhost_vsock
        self.tsc_khz = tsc_khz

    @property
    def name(self) -> VmmName:
        return "qemu"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            vsock="host" if self.vhost_vsock else None,
            snapshot=False,
            emulated=self.accel == "tcg",
            user_network=True,
        )

    def build_launch(self, machine: Machine) -> Launch:
        """The whole machine as one command line; sockets relative to the runtime directory.

        Raises:
            BangerError: unsupported: a vsock on a host without /dev/vhost-vsock.
        """
        if machine.vsock_cid is not None and not self.vhost_vsock:
            raise BangerError(
                "bad_request",
                "qemu has no vsock here: /dev/vhost-vsock cannot be opened",
                hint="sudo modprobe vhost_vsock",
                reason="unsupported",
            )
        argv = [
            str(self.program),
            "-no-user-config", "-nodefaults",
            "-display", "none",
            "-no-reboot",
            "-name", f"guest=banger-{machine.vm_id}",
            "-M", self._machine_type(),
            *self._processor(),
            "-smp", str(machine.vcpu),
            "-m", f"{machine.memory_mib}M",
            "-kernel", str(machine.kernel),
            "-initrd", str(machine.initrd),
            # By ACPI: microvm has no keyboard controller, and a kernel that looks for one
            # spends seconds on it (emulated: as long as on its whole boot).
            "-append", build_kernel_args(machine, *self._kernel_args(), reboot="acpi"),
            "-chardev", f"socket,id=monitor,path={API_SOCKET},server=on,wait=off",
            "-mon", "chardev=monitor,mode=control",
            # Standard input is /dev/null; signals stay QEMU's own.
            "-chardev", "stdio,id=console,signal=off",
            "-serial", "chardev:console",
            "-device", "virtio-rng-device",
        ]  # fmt: skip
        for drive in machine.drives:
            argv += ["-blockdev", _blockdev(drive)]
            argv += ["-device", f"virtio-blk-device,drive={drive.role}"]
        argv += _network(machine.nic)
        if machine.vsock_cid is not None:
            argv += ["-device", f"vhost-vsock-device,guest-cid={machine.vsock_cid}"]
        if self.sandbox:
            argv += ["-sandbox", SANDBOX]
        return Launch(argv=tuple(argv), cwd=machine.runtime)

    async def start(
        self, machine: Machine, exited: asyncio.Event, *, timeout_s: float = 30
    ) -> None:
        """Wait until the monitor says that the guest runs; QEMU starts it without being asked.

        Raises:
            BangerError: QEMU ended (its last words are on the console), or does not answer.
        """
        socket = machine.runtime / API_SOCKET

        async def look() -> None:
            await wait_for_socket(socket)
            status = await qmp.execute(socket, "query-status")
            if status.get("running") is not True:
                raise BangerError(
                    "operation_failed",
                    f"QEMU is up, but its guest is {status.get('status', 'in no state')}",
                    reason="vmm_refused",
                )

        doing = f"starting qemu for VM {machine.vm_id[:8]}"
        await before_exit(look(), exited, doing=doing, timeout_s=timeout_s)

    async def pause(self, runtime: Path) -> None:
        await self._command(runtime, "stop")

    async def resume(self, runtime: Path) -> None:
        await self._command(runtime, "cont")

    async def _command(self, runtime: Path, command: str) -> None:
        await before_exit(
            qmp.execute(runtime / API_SOCKET, command),
            None,
            doing=f"sending {command} to the VM in {runtime.name}",
            timeout_s=_REQUEST_TIMEOUT_S,
        )

    @property
    def _tsc_stated(self) -> bool:
        return self.accel == "tcg" and self.tsc_khz is not None

    def _machine_type(self) -> str:
        # ACPI stays on: Debian's kernel finds virtio-mmio devices in no other way. The legacy timer
        # and interrupt controller go where the kernel has another way to know the time.
        timer = "off" if self.accel == "kvm" or self._tsc_stated else "on"
        return f"microvm,acpi=on,rtc=on,isa-serial=on,pit={timer},pic={timer}"

    def _processor(self) -> tuple[str, ...]:
        if self.accel == "kvm":
            return ("-accel", "kvm", "-cpu", "host")
        # One thread runs all vCPUs in turn. With a thread each, one vCPU may translate code just
        # while another patches it, and then runs what was there before: the kernel patches itself
        # all the time (static keys), and guests with two vCPUs die of it in the end, on int3.
        # The buffer for translated code, in MiB: by default it may outgrow the VM's memory limit.
        return ("-accel", "tcg,thread=single,tb-size=128", "-cpu", "max")

    def _kernel_args(self) -> tuple[str, ...]:
        args: tuple[str, ...] = ("cryptomgr.notests",)
        if self.accel == "tcg":
            args = ("no_timer_check", *args)
        if self._tsc_stated:
            # Calibrating against an emulated timer fails on a busy host, and the kernel then hangs;
            # `reliable` keeps lost ticks from discrediting the one clock that does not drift.
            args = (f"tsc_early_khz={self.tsc_khz}", "tsc=reliable", *args)
        return args


def escape(value: str | Path) -> str:
    """A value inside one of QEMU's comma-separated options: a comma is written twice."""
    return str(value).replace(",", ",,")


def _blockdev(drive: Drive) -> str:
    """One raw file. `-blockdev`, because `-drive file=` reads a protocol into names with colons.

    Writable disks keep QEMU's lock, so that no two VMs share one; read-only ones are shared.
    The host's page cache is used and the guest's flushes are honoured (write-back).
    """
    read_only = "on" if drive.read_only else "off"
    locking = "off" if drive.read_only else "auto"
    return (
        f"driver=raw,node-name={drive.role},read-only={read_only},auto-read-only=off,"
        f"discard=unmap,cache.direct=off,cache.no-flush=off,"
        f"file.driver=file,file.filename={escape(drive.path)},file.locking={locking},"
        f"file.aio=threads,file.discard=unmap,file.cache.direct=off,file.cache.no-flush=off"
    )


def _network(nic: TapNic | UserNic | None) -> list[str]:
    if nic is None:
        return []
    device = ["-device", f"virtio-net-device,netdev=net0,mac={nic.mac}"]
    if isinstance(nic, TapNic):
        tap = f"tap,id=net0,ifname={escape(nic.tap)},script=no,downscript=no,vhost=off"
        return ["-netdev", tap, *device]
    # `reconnect`: the launch does not fail, nor does the announcement, when the daemon that
    # listens there is just being restarted.
    announce = f"socket,id=announce,path={escape(nic.announce_socket)},server=off,reconnect=1"
    user = (
        f"user,id=net0,ipv6=off,restrict={'off' if nic.nat else 'on'},"
        f"net={USER_GATEWAY.rsplit('.', 1)[0]}.0/{USER_PREFIX},host={USER_GATEWAY},"
        f"dns={USER_DNS},dhcpstart={USER_GUEST_ADDRESS},"
        f"hostfwd=tcp:127.0.0.1:{nic.agent_port}-{USER_GUEST_ADDRESS}:{AGENT_PORT},"
        f"guestfwd=tcp:{USER_ANNOUNCE_ADDRESS}:{ANNOUNCE_PORT}-chardev:announce"
    )
    return ["-chardev", announce, "-netdev", user, *device]
