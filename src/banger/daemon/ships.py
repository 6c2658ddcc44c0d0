"""Repositories on their way into guests: inspected before a VM exists, put there when one runs."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from banger.daemon.turns import Turns
from banger.errors import BangerError
from banger.files import ensure_private_directory
from banger.rpc.trees import GuestFiles
from banger.workspace.files import list_shipped
from banger.workspace.inspect import Repository, precheck
from banger.workspace.manifest import find_manifest, write_manifest
from banger.workspace.names import format_name
from banger.workspace.options import ShipOptions
from banger.workspace.prepare import Preparation
from banger.workspace.service import prepare

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable

    from banger.api.params import ShipWorkspace
    from banger.api.records import VmRecord, Workspace
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter
    from banger.rpc.server import Call
    from banger.workspace.prepare import Prepared

T = TypeVar("T")

DEFAULT_PATH = "/root/repo"
_CONNECT_S = 15.0


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


async def inspect(daemon: Daemon, params: ShipWorkspace, *, readonly: bool = False) -> Shipment:
    """Everything that can be refused before a VM exists. Raises BangerError."""
    guest_path = check_guest_path(params.guest_path or DEFAULT_PATH)
    options = ShipOptions(
        mode=params.mode,
        branch=params.branch,
        from_ref=params.from_ref,
        include_untracked=params.include_untracked,
        readonly=readonly,
    )
    repository = await asyncio.to_thread(
        precheck, Path(params.path), options, scratch_parent=scratch_directory(daemon)
    )
    return Shipment(repository=repository, options=options, guest_path=guest_path)


def check_guest_path(path: str, *, anywhere: bool = False) -> str:
    """A directory of the guest, in its shortest form; below /root unless it may be `anywhere`.

    Raises:
        BangerError: bad_request.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or ".." in parts or not path.isprintable():
        raise BangerError(
            "bad_request", f"the guest path {path!r} is not absolute, or leads upwards"
        )
    if not anywhere and (len(parts) < 2 or parts[0] != "root"):
        raise BangerError(
            "bad_request",
            f"the guest path {path!r} is not below /root, where the work disk is",
            hint="--guest-path /root/NAME",
        )
    return "/" + "/".join(parts)


async def names(daemon: Daemon, shipment: Shipment) -> tuple[str, ...]:
    """The files that would be shipped, as they are printed."""
    found = await asyncio.to_thread(
        list_shipped,
        shipment.repository,
        shipment.options,
        scratch_parent=scratch_directory(daemon),
    )
    return tuple(format_name(name) for name in found)


async def ship(
    daemon: Daemon, vm: VmRecord, shipment: Shipment, report: Reporter
) -> tuple[Workspace, int, int]:
    """Put the repository into the guest; return what is recorded of it, its files and bytes.

    Raises:
        BangerError: the guest has its old tree, or none.
    """
    async with workspace_lock(daemon, vm):
        done = await put(daemon, vm, shipment, report)
    return done.manifest.workspace, done.files, done.bytes


async def put(
    daemon: Daemon, vm: VmRecord, shipment: Shipment, report: Reporter, *, force: bool = False
) -> Prepared:
    """As `ship`, with the workspace lock held; where it was put before, only changes go."""
    directory = daemon.vms.vm_paths(vm.id).directory

    def work(guest: GuestFiles) -> Prepared:
        what = Preparation(
            guest=guest,
            repository=shipment.repository,
            options=shipment.options,
            guest_path=shipment.guest_path,
            manifest=find_manifest(directory, shipment.guest_path),
            force=force,
            scratch=scratch_directory(daemon),
            report=report,
        )
        done = prepare(what)
        write_manifest(directory, done.manifest)
        if done.manifest.workspace.mise:
            _trust(guest, shipment.guest_path)
        return done

    return await in_guest(daemon, vm, work)


def _trust(guest: GuestFiles, path: str) -> None:
    # Without mise in the guest there is nothing to trust; what it says is no reason to fail.
    for mise in ("mise", "/root/.local/bin/mise"):
        argv = [mise, "trust", "--quiet", "--all"]
        if guest.run(argv, cwd=path, stdin=b"", out=lambda _: None)[0] != 127:
            return


async def in_guest(daemon: Daemon, vm: VmRecord, work: Callable[[GuestFiles], T]) -> T:
    """Run blocking work on a guest's files in a thread; it ends with this call or the machine.

    Raises:
        BangerError: not_running; connection_lost; whatever `work` raises.
    """
    guest = guest_files(daemon, vm)

    async def run() -> T:
        task = asyncio.ensure_future(asyncio.to_thread(work, guest))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            guest.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise

    return await daemon.vms.while_running(vm, run())


def guest_files(daemon: Daemon, vm: VmRecord) -> GuestFiles:
    """The files of a running VM's guest, for a thread. Raises BangerError, not_running."""
    client = daemon.vms.client(vm)
    loop = asyncio.get_running_loop()

    def connect() -> socket.socket:
        return asyncio.run_coroutine_threadsafe(client.open(), loop).result(_CONNECT_S)

    return GuestFiles(connect, client.request)


@contextlib.asynccontextmanager
async def workspace_lock(
    daemon: Daemon, vm: VmRecord, *, sending: Call | None = None
) -> AsyncIterator[None]:
    """One piece of work on a VM's workspaces at a time; `sending` hands out data meanwhile."""
    turns = daemon.workspace_locks.setdefault(vm.id, Turns())
    async with turns.take(sending=sending):
        yield


def scratch_directory(daemon: Daemon) -> Path:
    """Where temporary repositories are made."""
    return ensure_private_directory(daemon.paths.cache / "scratch")
