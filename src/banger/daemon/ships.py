"""Repositories on their way into guests: inspected before a VM exists, shipped when one runs."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.api.records import Workspace
from banger.errors import BangerError
from banger.files import ensure_private_directory
from banger.workspace.files import list_shipped
from banger.workspace.inspect import Repository, precheck
from banger.workspace.names import format_name
from banger.workspace.options import ShipOptions, ShipResult
from banger.workspace.pack import pack

if TYPE_CHECKING:
    from typing import BinaryIO

    from banger.api.params import ShipWorkspace
    from banger.api.records import VmRecord
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter


class Shipment(msgspec.Struct, frozen=True, kw_only=True):
    """A repository and where it will be in the guest."""

    repository: Repository
    options: ShipOptions
    guest_path: str

    @property
    def working_directory(self) -> str:
        """Where the command runs: the directory that PATH named."""
        below = self.repository.subdirectory
        return f"{self.guest_path}/{below}" if below else self.guest_path


async def inspect(daemon: Daemon, params: ShipWorkspace) -> Shipment:
    """Everything that can be refused before a VM exists. Raises BangerError."""
    options = ShipOptions(
        mode=params.mode,
        branch=params.branch,
        from_ref=params.from_ref,
        include_untracked=params.include_untracked,
    )
    repository = await asyncio.to_thread(
        precheck, Path(params.path), options, scratch_parent=_scratch(daemon)
    )
    return Shipment(
        repository=repository,
        options=options,
        guest_path=params.guest_path or "/root/repo",
    )


async def names(daemon: Daemon, shipment: Shipment) -> tuple[str, ...]:
    """The files that would be shipped, as they are printed."""
    found = await asyncio.to_thread(
        list_shipped, shipment.repository, shipment.options, scratch_parent=_scratch(daemon)
    )
    return tuple(format_name(name) for name in found)


async def ship(
    daemon: Daemon, vm: VmRecord, shipment: Shipment, report: Reporter
) -> tuple[Workspace, int, int]:
    """Put the repository into the guest; return what is recorded of it, its files and bytes.

    Raises:
        BangerError: the guest has its old tree, or none.
    """
    stopped = threading.Event()
    scratch = _scratch(daemon)

    def write(out: BinaryIO) -> ShipResult:
        return pack(
            shipment.repository,
            shipment.options,
            out,
            cancelled=stopped.is_set,
            reporter=report,
            scratch_parent=scratch,
        )

    try:
        result, received = await daemon.vms.while_running(
            vm, daemon.vms.client(vm).put(shipment.guest_path, write)
        )
    finally:
        stopped.set()
    if received.files != result.stream_files or received.bytes != result.stream_bytes:
        raise BangerError(
            "operation_failed",
            f"copying {shipment.repository.root} into VM {vm.name}: "
            f"{result.stream_files} files with {result.stream_bytes} bytes were sent, "
            f"{received.files} with {received.bytes} arrived",
            hint=f"banger vm logs {vm.name}",
        )
    workspace = Workspace(
        guest_path=shipment.guest_path,
        source=str(shipment.repository.root),
        base_commit=result.base_commit,
        branch=result.branch,
        mode=shipment.options.mode,
    )
    return workspace, result.file_count, result.byte_count


def _scratch(daemon: Daemon) -> Path:
    return ensure_private_directory(daemon.paths.cache / "scratch")
