"""The calls about workspaces: prepare, export, changes. Bytes go to the client as data frames."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import msgspec

from banger.api import params as p
from banger.api import workspaces as w
from banger.daemon import ships
from banger.errors import BangerError
from banger.rpc import frames
from banger.store.vms import now_text
from banger.vm import idle
from banger.workspace.export import (
    Exported,
    Source,
    export_commits,
    export_patch,
    export_tar,
    find_changes,
    open_source_ground,
)
from banger.workspace.git import source_git
from banger.workspace.inspect import inspect_repository
from banger.workspace.landed import write_changes
from banger.workspace.manifest import accept_offer, find_manifest, write_offer

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.api.records import VmRecord, Workspace
    from banger.daemon.daemon import Daemon
    from banger.rpc.server import Call
    from banger.rpc.trees import GuestFiles
    from banger.workspace.repository import Repository


async def prepare(daemon: Daemon, call: Call, params: w.PrepareWorkspace) -> w.PreparedWorkspace:
    """Put a repository into a running guest, or bring it up to date there."""
    vm = daemon.store.resolve(params.vm)
    daemon.vms.client(vm)  # refused before anything is read when the VM does not run
    vm = idle.touch(daemon.vms, vm)
    call.stage("inspect", "inspecting the repository", params.path or "")
    shipment = await _shipment(daemon, vm, params)
    async with ships.workspace_lock(daemon, vm):
        call.stage("workspace", "copying the repository", shipment.guest_path)
        done = await ships.put(daemon, vm, shipment, call, force=params.force)
        workspace = done.manifest.workspace
        vm = daemon.store.update(vm.id, workspace=workspace, touched_at=now_text())
    return w.PreparedWorkspace(
        vm=vm,
        workspace=workspace,
        name=shipment.repository.name,
        files=done.files,
        bytes=done.bytes,
        sent=done.sent,
    )


async def _shipment(daemon: Daemon, vm: VmRecord, params: w.PrepareWorkspace) -> ships.Shipment:
    if params.path is not None:
        wanted = p.ShipWorkspace(
            path=params.path,
            mode=params.mode,
            branch=params.branch,
            from_ref=params.from_ref,
            include_untracked=params.include_untracked,
            guest_path=params.guest_path,
        )
        return await ships.inspect(daemon, wanted, readonly=params.readonly)
    recorded = _recorded(daemon, vm, params.guest_path)
    if recorded is None:
        raise BangerError(
            "not_found",
            f"VM {vm.name} has no workspace"
            + (f" at {params.guest_path}" if params.guest_path else "")
            + " that could be prepared again",
            hint=f"banger vm workspace prepare {vm.name} PATH",
        )
    wanted = p.ShipWorkspace(
        path=str(Path(recorded.source) / recorded.subdirectory),
        mode=cast("Any", recorded.mode),
        branch=recorded.new_branch,
        from_ref=recorded.from_ref,
        include_untracked=recorded.include_untracked,
        guest_path=recorded.guest_path,
    )
    return await ships.inspect(daemon, wanted, readonly=recorded.readonly)


def _recorded(daemon: Daemon, vm: VmRecord, guest_path: str | None) -> Workspace | None:
    if guest_path is None:
        return vm.workspace
    path = ships.check_guest_path(guest_path, anywhere=True)
    manifest = find_manifest(daemon.vms.vm_paths(vm.id).directory, path)
    if manifest is not None:
        return manifest.workspace
    return vm.workspace if vm.workspace is not None and vm.workspace.guest_path == path else None


async def export(daemon: Daemon, call: Call, params: w.ExportWorkspace) -> w.ExportedWorkspace:
    """What was done in the guest: the data frames are the patch, the bundle or the tar."""
    vm, path = _place(daemon, params.vm, params.guest_path)

    def work(guest: GuestFiles) -> Exported:
        source = _source(daemon, vm, path, guest, call, params.base_commit)
        if params.format == "tar":
            with io.BufferedWriter(_CallWriter(send), frames.PAYLOAD_LIMIT) as out:
                return export_tar(source, cast("BinaryIO", out))
        return (export_commits if params.format == "commits" else export_patch)(source, send)

    send = call.data_sender()
    async with ships.workspace_lock(daemon, vm, sending=call):
        call.stage("export", "comparing", path)
        done = await ships.in_guest(daemon, vm, work)
    idle.touch(daemon.vms, vm)
    return w.ExportedWorkspace(
        vm=vm.name,
        guest_path=path,
        base_commit=done.base_commit,
        changed=done.changed,
        names=_fitting(done.names),
        bytes=done.byte_count,
    )


async def changes(daemon: Daemon, call: Call, params: w.WorkspaceRef) -> w.ExportedWorkspace:
    """The files that the guest changed, for `apply`; the data is described at `ChangedFiles`."""
    vm, path = _place(daemon, params.vm, params.guest_path)

    def work(guest: GuestFiles) -> tuple[int, str]:
        source = _source(daemon, vm, path, guest, call, None)
        with open_source_ground(source) as ground:
            found, then = find_changes(source, ground)
            assert source.manifest is not None
            repository = source.repository
            header = w.ChangedFiles(
                source=source.manifest.workspace.source,
                guest_path=path,
                object_format=source.object_format,
                file_mode=repository is None or repository.setting("core.filemode") != "false",
                changes=len(found),
            )
            with io.BufferedWriter(_CallWriter(send), frames.PAYLOAD_LIMIT) as out:
                out.write(msgspec.json.encode(header) + b"\n")
                write_changes(ground.work, found, cast("BinaryIO", out))
        return len(found), write_offer(daemon.vms.vm_paths(vm.id).directory, then)

    send = call.data_sender()
    async with ships.workspace_lock(daemon, vm, sending=call):
        call.stage("export", "comparing", path)
        changed, offer = await ships.in_guest(daemon, vm, work)
    return w.ExportedWorkspace(
        vm=vm.name,
        guest_path=path,
        base_commit=None,
        changed=changed,
        names=(),
        bytes=0,
        offer=offer,
    )


async def applied(daemon: Daemon, call: Call, params: w.AppliedWorkspace) -> p.VmRef:
    """From here on what the guest did then counts as known to the host: a later prepare may go on
    from it. An offer that is out of date changes nothing."""
    vm = daemon.store.resolve(params.vm)
    path = ships.check_guest_path(params.guest_path, anywhere=True)
    async with ships.workspace_lock(daemon, vm):
        accept_offer(daemon.vms.vm_paths(vm.id).directory, path, params.offer)
    return p.VmRef(vm=vm.name)


async def find_stale(vm: VmRecord) -> str | None:
    """How the recorded workspace is behind its source; None when it is not, or nobody can tell."""
    workspace = vm.workspace
    if workspace is None:
        return None
    # Where the source is gone git says so, too.
    git = source_git(Path(workspace.source))
    done = await asyncio.to_thread(
        git.try_run, "rev-parse", "--verify", "--quiet", "--end-of-options", "HEAD^{commit}"
    )
    head = done.stdout.decode().strip()
    if done.returncode != 0 or head == workspace.source_commit:
        return None
    was = workspace.source_commit[:12] if workspace.source_commit else "no commit"
    return f"{workspace.guest_path} is {workspace.source} at {was}, which is now at {head[:12]}"


def _place(daemon: Daemon, ref: str, guest_path: str | None) -> tuple[VmRecord, str]:
    """A running VM and the directory that is meant. Raises BangerError."""
    vm = daemon.store.resolve(ref)
    daemon.vms.client(vm)
    vm = idle.touch(daemon.vms, vm)
    if guest_path is not None:
        return vm, ships.check_guest_path(guest_path, anywhere=True)
    return vm, vm.workspace.guest_path if vm.workspace is not None else ships.DEFAULT_PATH


def _source(
    daemon: Daemon,
    vm: VmRecord,
    path: str,
    guest: GuestFiles,
    call: Call,
    base_commit: str | None,
) -> Source:
    manifest = find_manifest(daemon.vms.vm_paths(vm.id).directory, path)
    recorded = manifest.workspace if manifest is not None else None
    if recorded is None and vm.workspace is not None and vm.workspace.guest_path == path:
        recorded = vm.workspace
        base_commit = base_commit or recorded.base_commit
    return Source(
        guest=guest,
        path=path,
        repository=_find_repository(recorded, call) if recorded is not None else None,
        manifest=manifest,
        base_commit=base_commit,
        scratch=ships.scratch_directory(daemon),
        report=call,
    )


def _find_repository(recorded: Workspace, call: Call) -> Repository | None:
    try:
        return inspect_repository(Path(recorded.source))
    except BangerError as e:
        call.warn(f"the source {recorded.source} cannot be used: {e}")
        return None


def _fitting(names: tuple[str, ...]) -> tuple[str, ...]:
    """As many as surely fit in one frame."""
    kept, room = [], frames.PAYLOAD_LIMIT // 2
    for name in names:
        room -= 6 * len(name) + 4  # the longest way to write a character in JSON
        if room < 0:
            break
        kept.append(name)
    return tuple(kept)


class _CallWriter(io.RawIOBase):
    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._send(bytes(data))
        return len(data)
