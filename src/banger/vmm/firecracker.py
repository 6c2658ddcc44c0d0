"""The Firecracker driver: configured through its API, started by its last document.

The VMM runs in the VM's runtime directory, and every path in a document is the name of a symbolic
link there (`kernel`, `initrd`, `image`, `overlay`, `work`, `modules`). A snapshot records the paths
as they were given: names without a directory lead into whatever runtime directory it is restored
in, where paths relative to the state directory would lead to the first VM's disks.

The links and Firecracker's sockets live as long as the runtime directory.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.vmm import firecracker_api
from banger.vmm.driver import before_exit, wait_for_socket
from banger.vmm.machine import (
    API_SOCKET,
    VSOCK_SOCKET,
    Capabilities,
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

KERNEL_LINK, INITRD_LINK = "kernel", "initrd"
# There is no PCI bus and no keyboard behind the i8042 that `reboot=k` uses to end the VM: without
# these the kernel looks for both.
_ARGS = ("pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd", "cryptomgr.notests")
# Firecracker starts answering within 20 ms; a loaded host may need a hundred times that.
_REQUEST_TIMEOUT_S = 15.0

Document = tuple[str, dict[str, object]]


class FirecrackerDriver:
    """Runs a `Machine` under a Firecracker binary of version 1.10.0 or newer."""

    def __init__(self, *, program: Path, version: str) -> None:
        self.program = program
        self.version = version

    @property
    def name(self) -> VmmName:
        return "firecracker"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            vsock="unix", snapshot=False, emulated=False, user_network=False, copies_initrd=True
        )

    def build_launch(self, machine: Machine) -> Launch:
        """`firecracker` with its API socket in the runtime directory, seccomp filters on."""
        if isinstance(machine.nic, UserNic):
            raise BangerError(
                "bad_request",
                "firecracker has no user-mode networking: it needs a tap",
                hint="banger doctor",
                reason="unsupported",
            )
        argv = (
            str(self.program),
            "--id", machine.vm_id,
            "--api-sock", API_SOCKET,
            # Its own log goes to the same place as the guest's console.
            "--level", "Warning",
        )  # fmt: skip
        return Launch(argv=argv, cwd=machine.runtime)

    async def start(
        self, machine: Machine, exited: asyncio.Event, *, timeout_s: float = 30
    ) -> None:
        """Wait for the API, send every document, start the guest.

        Raises:
            BangerError: Firecracker ended, or refused a document (named, with its own words).
        """
        if not machine.jailed:
            make_links(machine)
        socket = machine.runtime / API_SOCKET

        async def configure() -> None:
            await wait_for_socket(socket)
            for path, document in build_documents(machine):
                await firecracker_api.send(socket, "PUT", path, document)

        doing = f"starting firecracker for VM {machine.vm_id[:8]}"
        try:
            await before_exit(configure(), exited, doing=doing, timeout_s=timeout_s)
        except firecracker_api.Refused as e:
            raise BangerError(
                e.code, f"{doing}: {e.message}", hint="banger daemon status", reason=e.reason
            ) from e

    async def pause(self, runtime: Path) -> None:
        await self._set_state(runtime, "Paused")

    async def resume(self, runtime: Path) -> None:
        await self._set_state(runtime, "Resumed")

    async def _set_state(self, runtime: Path, state: str) -> None:
        request = firecracker_api.send(runtime / API_SOCKET, "PATCH", "/vm", {"state": state})
        await before_exit(
            request,
            None,
            doing=f"setting the VM in {runtime.name} to {state}",
            timeout_s=_REQUEST_TIMEOUT_S,
        )


def build_documents(machine: Machine) -> tuple[Document, ...]:
    """The requests that make a machine, in order; the last one starts it.

    No drive is a root device: Firecracker would add `root=` to the kernel's arguments. Drives are
    numbered in the order of their requests, so the first is vda.

    Source: Firecracker 1.12, src/firecracker/swagger/firecracker.yaml.
    """
    documents: list[Document] = [
        (
            "/machine-config",
            {"vcpu_count": machine.vcpu, "mem_size_mib": machine.memory_mib, "smt": False},
        ),
        (
            "/boot-source",
            {
                "kernel_image_path": KERNEL_LINK,
                "initrd_path": INITRD_LINK,
                "boot_args": build_kernel_args(machine, *_ARGS, reboot="keyboard"),
            },
        ),
    ]
    documents += [
        (
            f"/drives/{drive.role}",
            {
                "drive_id": drive.role,
                "path_on_host": drive.role,
                "is_root_device": False,
                "is_read_only": drive.read_only,
                # The default, Unsafe, offers the guest no flush: what it synced could be lost.
                "cache_type": "Unsafe" if drive.read_only else "Writeback",
                "io_engine": "Sync",
            },
        )
        for drive in machine.drives
    ]
    if isinstance(machine.nic, TapNic):
        nic = {"iface_id": "eth0", "host_dev_name": machine.nic.tap, "guest_mac": machine.nic.mac}
        documents.append(("/network-interfaces/eth0", dict(nic)))
    if machine.vsock_cid is not None:
        documents.append(("/vsock", {"guest_cid": machine.vsock_cid, "uds_path": VSOCK_SOCKET}))
    documents.append(("/entropy", {}))
    documents.append(("/actions", {"action_type": "InstanceStart"}))
    return tuple(documents)


def make_links(machine: Machine) -> None:
    """Make the links that the documents name, in place of those of an earlier start."""
    targets = {KERNEL_LINK: machine.kernel, INITRD_LINK: machine.initrd}
    targets |= {drive.role: drive.path for drive in machine.drives}
    for name, target in targets.items():
        link = machine.runtime / name
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(target)
