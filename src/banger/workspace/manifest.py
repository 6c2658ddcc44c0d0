"""What a prepare put into a guest, file by file: kept on the host, below the VM's directory.

With it an export knows which files of the guest were touched, a later prepare ships what has
changed, and `apply` knows what the user's files were. It is written when the guest has the tree,
and goes with the VM. One that is older than what the guest has (the answer to a prepare was lost)
makes its files look touched, and then their content decides.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from banger.api.records import Workspace
from banger.decoding import MALFORMED, decode_msgpack
from banger.faults import step
from banger.files import sync_directory, write_atomic
from banger.rpc.trees import Record  # noqa: TC001 - msgspec reads the annotations
from banger.workspace.options import HostStat  # noqa: TC001 - msgspec reads the annotations
from banger.workspace.tree_id import TreeHasher

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from banger.rpc.trees import Entry

_VERSION = 1


class ShippedFile(NamedTuple):
    """One file. `mode` is git's, `oid` the id of its bytes as a blob.

    `stands_for` is the blob that git takes the file for where its bytes are another one: line ends,
    filters. `host` and `guest` tell whether it was touched since, on either side.
    """

    mode: int
    oid: bytes
    size: int
    stands_for: bytes | None
    host: HostStat | None
    guest: Record | None

    def is_untouched(self, entry: Entry) -> bool:
        """Whether the guest's file is the one that was put there."""
        return (
            self.guest is not None
            and self.guest == entry.record
            and self.guest.precise
            and self.size == entry.size
        )


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One workspace as it was put into the guest.

    `head`, `refs`, `texts`, `boundary` and `tips` are those of its `.git`; `skip_worktree` the
    tracked files that are not checked out, `nested` the repositories inside.
    """

    version: int = _VERSION
    workspace: Workspace
    object_format: str
    files: dict[bytes, ShippedFile]
    head: str
    refs: dict[str, str]
    texts: dict[bytes, bytes]
    boundary: tuple[str, ...]
    tips: tuple[str, ...]
    skip_worktree: tuple[bytes, ...] = ()
    assume_unchanged: tuple[bytes, ...] = ()
    nested: tuple[bytes, ...] = ()


def manifest_path(directory: Path, guest_path: str) -> Path:
    """The file of one guest path in a VM's directory."""
    name = hashlib.sha256(guest_path.encode(errors="surrogateescape")).hexdigest()[:32]
    return directory / "workspaces" / f"{name}.msgpack"


def find_manifest(directory: Path, guest_path: str) -> Manifest | None:
    """What was put at a guest path; None when nothing was, or nobody can tell any more."""
    try:
        found = decode_msgpack(manifest_path(directory, guest_path).read_bytes(), type=Manifest)
    except (FileNotFoundError, *MALFORMED):
        return None
    return found if found.version == _VERSION else None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Keep a manifest, in one piece; what was offered before is out of date. Raises OSError."""
    path = manifest_path(directory, manifest.workspace.guest_path)
    with step("prepare.record"):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _forget_offers(path)
        write_atomic(path, msgspec.msgpack.encode(manifest))


def write_offer(directory: Path, manifest: Manifest) -> str:
    """Keep a manifest aside until the host has what it says; the id of this offer. An earlier one
    of the same guest path is forgotten. Raises OSError."""
    path = manifest_path(directory, manifest.workspace.guest_path)
    _forget_offers(path)
    offer = os.urandom(8).hex()
    write_atomic(path.with_suffix(f".offer-{offer}"), msgspec.msgpack.encode(manifest))
    return offer


def _forget_offers(path: Path) -> None:
    for old in path.parent.glob(f"{path.stem}.offer-*"):
        old.unlink(missing_ok=True)


def accept_offer(directory: Path, guest_path: str, offer: str) -> bool:
    """Make an offer the manifest; False when there is no such offer (any more)."""
    path = manifest_path(directory, guest_path)
    if not offer.isalnum():
        return False
    try:
        path.with_suffix(f".offer-{offer}").replace(path)
        sync_directory(path.parent)
    except FileNotFoundError:
        return False
    return True


def tree_id(files: Mapping[bytes, ShippedFile], object_format: str) -> str:
    """The git tree of files as they were shipped, byte for byte."""
    hasher = TreeHasher(object_format)
    for name, file in files.items():
        hasher.add(name, file.oid, executable=file.mode == 0o100755, link=file.mode == 0o120000)
    return hasher.finish()
