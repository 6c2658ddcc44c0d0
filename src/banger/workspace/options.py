"""What the caller asks to be shipped, and what came of it: plain values."""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["shallow_overlay", "metadata_only", "full_copy"]


class ShipOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`from_ref` without `branch` is refused; None means HEAD."""

    mode: Mode = "shallow_overlay"
    branch: str | None = None
    from_ref: str | None = None
    include_untracked: bool = False


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
