"""What the caller asks to be shipped, and what came of it: plain values."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Mode = Literal["shallow_overlay", "metadata_only", "full_copy"]


class ShipOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`from_ref` without `branch` is refused; None means HEAD."""

    mode: Mode = "shallow_overlay"
    branch: str | None = None
    from_ref: str | None = None
    include_untracked: bool = False
    readonly: bool = False


DIRECTORY = 0o040000


class Candidate(NamedTuple):
    """One path to ship. `oid` is None for the file on disk; else the blob is shipped. `mode` is
    what git has recorded: 0 for a file it does not track, `DIRECTORY` in a full copy."""

    name: bytes
    mode: int
    oid: str | None


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The plan. `target` is the commit that the guest checks out, None on an unborn branch.

    `skip_worktree` and `assume_unchanged` are the flags of the copy's index. `nested` are the
    directories of a full copy that are repositories themselves. `left_out` names what cannot be
    shipped: sockets, FIFOs, devices, repositories among untracked files.
    """

    target: str | None
    candidates: tuple[Candidate, ...]
    skip_worktree: tuple[bytes, ...] = ()
    assume_unchanged: tuple[bytes, ...] = ()
    nested: tuple[bytes, ...] = ()
    left_out: tuple[bytes, ...] = ()


class HostStat(NamedTuple):
    """What tells that a file of the host was not touched; times in ns."""

    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int


class PackedFile(NamedTuple):
    """One file as it was put into a stream. `mode` is git's; `oid` the id of its bytes as a blob;
    `host` what it was on disk, None when it did not come from there or may change unseen."""

    name: bytes
    mode: int
    oid: bytes
    size: int
    host: HostStat | None


class GitPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest's `.git` says, and what its pack has to hold.

    `texts` are the small files by name; `tips` and `boundary` the ends of the history that goes
    along; `refs` what the refs name.
    """

    head: str
    refs: dict[str, str]
    tips: tuple[str, ...]
    boundary: tuple[str, ...]
    texts: dict[bytes, bytes]


class ShipResult(msgspec.Struct, frozen=True, kw_only=True):
    """What went into the stream.

    `file_count` and `byte_count` are the files that `list_shipped` names; `stream_files` and
    `stream_bytes` also count those of `.git`, as a receiver counts them (directories are not
    counted). `base_commit` is the commit that the guest's HEAD names, None for an unborn branch.
    `tree_id` is the git tree of the shipped files, byte for byte as shipped (no line-end
    conversion); None in `full_copy`.
    """

    guest_name: str
    subdirectory: str
    base_commit: str | None
    branch: str | None
    file_count: int
    byte_count: int
    stream_files: int
    stream_bytes: int
    tree_id: str | None
    packed: tuple[PackedFile, ...] = ()
    stand_ins: dict[bytes, bytes] = {}
    selection: Selection | None = None
    git: GitPlan | None = None
    members: tuple[bytes, ...] = ()
    """The names of the files of the whole stream, in its order."""
