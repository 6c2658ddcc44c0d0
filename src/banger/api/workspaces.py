"""Workspaces on the wire (spec 8): what is asked about them, and what comes back."""

from __future__ import annotations

from typing import Literal

from banger.api.base import Params, Wire
from banger.api.params import WorkspaceMode
from banger.api.records import VmRecord, Workspace

ExportFormat = Literal["patch", "commits", "tar"]


class PrepareWorkspace(Params, frozen=True, kw_only=True):
    """`path` None: the recorded workspace again, as it was prepared; then only `guest_path` and
    `force` count."""

    vm: str
    path: str | None = None
    guest_path: str | None = None
    mode: WorkspaceMode = "shallow_overlay"
    branch: str | None = None
    from_ref: str | None = None
    include_untracked: bool = False
    readonly: bool = False
    force: bool = False


class ExportWorkspace(Params, frozen=True, kw_only=True):
    """`guest_path` None: where the last prepare put one. `base_commit` None: what it recorded."""

    vm: str
    guest_path: str | None = None
    base_commit: str | None = None
    format: ExportFormat = "patch"


class WorkspaceRef(Params, frozen=True, kw_only=True):
    vm: str
    guest_path: str | None = None


class AppliedWorkspace(Params, frozen=True, kw_only=True):
    """The host has what the result of `vm.workspace.changes` with this `offer` described."""

    vm: str
    guest_path: str
    offer: str


class PreparedWorkspace(Wire, frozen=True, kw_only=True):
    """`files` and `bytes` are the workspace's; `sent` the files that had to go over."""

    vm: VmRecord
    workspace: Workspace
    name: str
    files: int
    bytes: int
    sent: int


class ExportedWorkspace(Wire, frozen=True, kw_only=True):
    """`names` are the first of the `changed` files (commits, for `commits`) as they are printed."""

    vm: str
    guest_path: str
    base_commit: str | None
    changed: int
    names: tuple[str, ...]
    bytes: int
    offer: str = ""
    """Of `changes`: what to give back to `applied`."""


class ChangedFiles(Wire, frozen=True, kw_only=True):
    """The first line of the data of `vm.workspace.changes`: what belongs to this host.

    After it come the changes, each a status `<mode> <oid> <mode> <oid>`, NUL, a name, NUL, as in
    `git diff --raw -z` (an absent side is `0 -`; the ids are those of the bytes); then an empty
    status, NUL; then one tar of the new files.
    """

    source: str
    guest_path: str
    object_format: str
    file_mode: bool
    """Whether the host's filesystem keeps x bits."""
    changes: int
