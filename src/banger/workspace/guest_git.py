"""What a guest's `.git` says, read as bytes: refs, and which names its index tracks.

No git runs on it: the files are a guest's, so they are capped and parsed here, and whatever is odd
about them is an error or nothing.

Source: gitrepository-layout(5), gitformat-index(5).
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.errors import BangerError
from banger.rpc.trees import MAX_ENTRIES, MAX_NAME, MAX_NAME_BYTES
from banger.workspace.tar_reader import TarReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from banger.rpc.trees import GuestFiles

_MAX_SMALL = 64 << 20
_MAX_INDEX = 1 << 29  # 2,000,000 entries take no more
_OID = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_EXTENDED = 0x4000
_SKIP_WORKTREE = 0x4000
_GITLINK = 0o160000
_TREE = 0o040000


class GuestRefs(NamedTuple):
    """`head` is the text of HEAD: `ref: …` or a commit. `loose` are the refs with a file of their
    own. Names are as in Python's file names (surrogates for odd bytes)."""

    head: str
    refs: dict[str, str]
    loose: frozenset[str]

    @property
    def commit(self) -> str | None:
        """What HEAD names; None on an unborn branch or without a usable HEAD."""
        if self.head.startswith("ref: "):
            return self.refs.get(self.head[5:])
        return self.head if _OID.fullmatch(self.head.encode()) else None


class TrackedNames(NamedTuple):
    """The names of an index; `skipped` are those that are not checked out on purpose, and
    `skipped_directories` (with a slash) those of a sparse index."""

    names: frozenset[bytes]
    skipped: frozenset[bytes]
    skipped_directories: tuple[bytes, ...]


def fetch_small(
    guest: GuestFiles, path: str, names: Iterable[bytes], *, cap: int = _MAX_SMALL
) -> dict[bytes, bytes]:
    """The content of some files below `path`; what is not there, or no plain file, is left out.

    Raises:
        BangerError: together they are larger than `cap` bytes.
    """
    doing = f"fetching files of {path} from the guest"

    def receive(stream: BinaryIO) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        left = cap
        reader = TarReader(stream, doing)
        for member in reader:
            if member.kind != "file":
                continue
            left -= member.size + len(member.name)
            if left < 0:
                raise BangerError("operation_failed", f"{doing}: more than {cap >> 20} MiB")
            parts = []
            while chunk := reader.read(1 << 20):
                parts.append(chunk)
            found[member.name] = b"".join(parts)
        return found

    try:
        return guest.get(path, list(names), receive)
    except BangerError as e:
        raise absent(path) if guest.is_absent(e) else e from None


def absent(path: str) -> BangerError:
    """The error of a workspace that is not there."""
    return BangerError(
        "not_found",
        f"there is no directory {path} in the guest",
        hint="banger vm workspace prepare VM PATH",
    )


def fetch_refs(guest: GuestFiles, path: str) -> GuestRefs:
    """HEAD and the refs of the repository at `path`; everything empty where there is none."""
    files = fetch_small(guest, path, (b".git/HEAD", b".git/packed-refs", b".git/refs"))
    head = files.pop(b".git/HEAD", b"").strip().decode(errors="surrogateescape")
    refs = {}
    for line in files.pop(b".git/packed-refs", b"").split(b"\n"):
        oid, _, name = line.partition(b" ")
        if name and _OID.fullmatch(oid):
            refs[name.decode(errors="surrogateescape")] = oid.decode()
    loose = set()
    for name, text in files.items():
        ref = name.removeprefix(b".git/").decode(errors="surrogateescape")
        loose.add(ref)
        if _OID.fullmatch(text.strip()):
            refs[ref] = text.strip().decode()
    return GuestRefs(head=head, refs=refs, loose=frozenset(loose))


def fetch_tracked(guest: GuestFiles, path: str, object_format: str) -> TrackedNames:
    """What the guest's index tracks; nothing where there is none.

    Raises:
        BangerError: it is damaged.
    """
    files = fetch_small(guest, path, (b".git/index",), cap=_MAX_INDEX)
    index = files.get(b".git/index")
    if index is None:
        return TrackedNames(frozenset(), frozenset(), ())
    found, shared = _parse(index, object_format)
    if shared is not None:
        # A split index: names that only the shared part has may be gone; an extra name in this
        # set can only make an ignored file count as tracked.
        name = b".git/sharedindex." + shared
        base = fetch_small(guest, path, (name,), cap=_MAX_INDEX).get(name)
        if base is not None:
            more = parse_index(base, object_format)
            found = TrackedNames(
                found.names | more.names, found.skipped | more.skipped, found.skipped_directories
            )
    return found


def parse_index(index: bytes, object_format: str) -> TrackedNames:
    """The names of an index file of version 2 to 4. Raises as `fetch_tracked`."""
    return _parse(index, object_format)[0]


def _parse(index: bytes, object_format: str) -> tuple[TrackedNames, bytes | None]:
    """The names, and the id of the shared file that a split index builds on."""
    names, skipped, directories = set(), set(), []
    size = 32 if object_format == "sha256" else 20
    try:
        entries, end = _entries(index, size)
        # The extension of a split index comes first.
        shared = index[end + 8 : end + 8 + size] if index[end : end + 4] == b"link" else b""
    except (struct.error, IndexError, ValueError) as e:
        raise BangerError("operation_failed", f"reading the guest's index: {e}") from e
    for name, mode, skip in entries:
        if mode & 0o170000 == _TREE:
            directories.append(name)
        elif mode & 0o170000 != _GITLINK:
            names.add(name)
            if skip:
                skipped.add(name)
    found = TrackedNames(frozenset(names), frozenset(skipped), tuple(directories))
    return found, shared.hex().encode() if any(shared) else None


def _entries(index: bytes, hash_bytes: int) -> tuple[list[tuple[bytes, int, bool]], int]:
    """Name, mode and the skip-worktree flag of each entry; and where the entries end."""
    magic, version, count = struct.unpack_from(">4sII", index)
    if magic != b"DIRC" or version not in (2, 3, 4):
        raise ValueError("not an index of a known version")
    if count > MAX_ENTRIES:
        raise ValueError(f"more than {MAX_ENTRIES} names")
    at, name, entries = 12, b"", []
    # In version 4 a few bytes stand for a whole name: all of it but its end is that of the last.
    room = MAX_NAME_BYTES
    for _ in range(count):
        start = at
        mode = int.from_bytes(index[at + 24 : at + 28], "big")
        at += 40 + hash_bytes
        (flags,) = struct.unpack_from(">H", index, at)
        at += 2
        skip = False
        if flags & _EXTENDED and version > 2:
            skip = bool(struct.unpack_from(">H", index, at)[0] & _SKIP_WORKTREE)
            at += 2
        if version == 4:
            drop, at = _offset(index, at)
            end = index.index(b"\0", at)
            if drop > len(name):
                raise ValueError("a name that is shorter than nothing")
            name = name[: len(name) - drop] + index[at:end]
            at = end + 1
        else:
            end = index.index(b"\0", at)
            name = index[at:end]
            at = start + ((end - start) // 8 + 1) * 8
        room -= len(name)
        if len(name) > MAX_NAME or room < 0:
            raise ValueError("names that are too long")
        entries.append((name, mode, skip))
    return entries, at


def _offset(index: bytes, at: int) -> tuple[int, int]:
    """A variable-width integer (gitformat-pack(5), "offset encoding") and what is behind it."""
    byte = index[at]
    value = byte & 0x7F
    while byte & 0x80:
        at += 1
        byte = index[at]
        value = ((value + 1) << 7) | (byte & 0x7F)
        if value > 1 << 31:
            raise ValueError("a name that is too long")
    return value, at + 1
