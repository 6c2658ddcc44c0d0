"""Puts a repository into a guest, or brings what is there up to date.

The first time the whole tree goes, into a directory that must not hold anything. Later only what
has changed goes, into the tree that the guest works on, and only if nothing that was done there
would be lost. Everything blocks; `GuestFiles.cancel` ends it. A stream that is cut leaves the
guest's old tree.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.api.records import Workspace
from banger.errors import BangerError
from banger.store.vms import now_text
from banger.workspace.manifest import Manifest, ShippedFile
from banger.workspace.pack import pack

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from banger.progress import Reporter
    from banger.rpc.trees import GuestFiles, Record, Transferred
    from banger.workspace.options import GitPlan, PackedFile, Selection, ShipOptions, ShipResult
    from banger.workspace.repository import Repository

MISE_FILES = frozenset(
    (b"mise.toml", b".mise.toml", b".tool-versions", b".config/mise.toml", b".mise/config.toml")
)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is to be put where. `manifest` is of what lies there already."""

    guest: GuestFiles
    repository: Repository
    options: ShipOptions
    guest_path: str
    manifest: Manifest | None
    force: bool
    scratch: Path
    report: Reporter


class Prepared(NamedTuple):
    """`files` and `bytes` are the workspace's, `sent` the files that had to go over."""

    manifest: Manifest
    files: int
    bytes: int
    sent: int


def put_first(what: Preparation) -> Prepared:
    """Put the whole tree where nothing is yet.

    Raises:
        BangerError: already_exists: something is there; as `pack`; the guest's own error.
    """
    repository = what.repository

    def write(out: BinaryIO) -> ShipResult:
        return pack(
            repository,
            what.options,
            out,
            cancelled=lambda: what.guest.cancelled,
            reporter=what.report,
            scratch_parent=what.scratch,
        )

    # Whoever forces it has a workspace there of which nothing is recorded any more.
    mode = "update" if what.force and what.guest.stat(what.guest_path) is not None else "new"
    try:
        result, received, records = what.guest.put(what.guest_path, write, mode=mode)
    except BangerError as e:
        if e.code != "already_exists":
            raise
        raise in_the_way(what.guest_path) from e
    check_received(what, result.stream_files, result.stream_bytes, received)
    assert result.git is not None and result.selection is not None
    by_name = dict(zip(result.members, records, strict=True))
    files = {f.name: shipped(f, by_name.get(f.name), result.stand_ins) for f in result.packed}
    manifest = build_manifest(
        what, result.git, result.selection, files, tree=result.tree_id, branch=result.branch
    )
    return Prepared(manifest, result.file_count, result.byte_count, result.file_count)


def shipped(
    file: PackedFile, record: Record | None, stand_ins: Mapping[bytes, bytes]
) -> ShippedFile:
    return ShippedFile(file.mode, file.oid, file.size, stand_ins.get(file.name), file.host, record)


def build_manifest(
    what: Preparation,
    plan: GitPlan,
    selection: Selection,
    files: dict[bytes, ShippedFile],
    *,
    tree: str | None,
    branch: str | None,
) -> Manifest:
    """What is kept of a preparation that has succeeded."""
    repository, options = what.repository, what.options
    workspace = Workspace(
        guest_path=what.guest_path,
        source=str(repository.root),
        base_commit=selection.target,
        branch=branch,
        mode=options.mode,
        source_commit=repository.head_commit,
        tree_id=tree,
        readonly=options.readonly,
        include_untracked=options.include_untracked,
        new_branch=options.branch,
        from_ref=options.from_ref,
        subdirectory=repository.subdirectory,
        mise=not MISE_FILES.isdisjoint(files),
        prepared_at=now_text(),
    )
    return Manifest(
        workspace=workspace,
        object_format=repository.object_format,
        files=files,
        head=plan.head,
        refs=plan.refs,
        texts=plan.texts,
        boundary=plan.boundary,
        tips=plan.tips,
        skip_worktree=selection.skip_worktree,
        assume_unchanged=selection.assume_unchanged,
        nested=selection.nested,
    )


def check_received(what: Preparation, files: int, size: int, received: Transferred) -> None:
    """Refuse a transfer of which something is missing."""
    if received.files != files or received.bytes != size:
        raise BangerError(
            "operation_failed",
            f"copying {what.repository.root} to {what.guest_path} in the guest: {files} files with "
            f"{size} bytes were sent, {received.files} with {received.bytes} arrived",
        )


def in_the_way(guest_path: str) -> BangerError:
    """The error of a target that is no workspace of this source."""
    return BangerError(
        "already_exists",
        f"{guest_path} in the guest exists already and is no workspace of this repository",
        hint=f"another --guest-path, or: banger vm exec VM -- rm -r {shlex.quote(guest_path)}",
    )
