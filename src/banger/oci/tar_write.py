"""Writing the merged tar stream, in the words that sqfstar understands.

Plain ustar headers where they suffice; pax records, with raw bytes in them, where they do not. Long
names are pax, not GNU. A sparse file keeps its holes (GNU's pax format 1.0), so that a log of
100 GB of nothing costs nothing here either.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from banger.oci.sparse import Filler, lay_out
from banger.oci.tar_read import BLOCK, REGULAR

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.oci.sparse import Piece
    from banger.oci.tar_read import Member

_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s167s")
_END = bytes(2 * BLOCK)
_MOST_ID = 0o7777777
_MOST_SIZE = _MOST_MTIME = 0o77777777777


class Body:
    """What follows a member's header: `write` takes its data in pieces, `end` comes last."""

    __slots__ = ("_filler", "_padding", "_write", "write")

    def __init__(
        self, write: Callable[[bytes], object], padding: int, filler: Filler | None = None
    ) -> None:
        self._write, self._padding, self._filler = write, padding, filler
        self.write = write if filler is None else filler.write

    def end(self) -> None:
        if self._filler is not None:
            self._filler.end()
        self._write(bytes(self._padding))


def write_member(write: Callable[[bytes], object], m: Member, name: bytes) -> Body:
    """Write a member's header under `name`; the result takes its data (`stored` bytes)."""
    records = [(b"SCHILY.xattr." + key, value) for key, value in m.xattrs]
    size = m.stored if m.kind == REGULAR else 0
    if m.sparse is None:
        write(_header(m, name, m.kind, m.link, size, records))
        return Body(write, -size % BLOCK)
    if m.size < BLOCK:
        # Too short for a map that sqfstar understands; its holes are nothing worth.
        laid: tuple[Piece, ...] = ((0, m.size),)
        size, before = m.size, b""
    else:
        laid = lay_out(m.sparse, m.size)
        numbers = [len(laid), *(n for piece in laid for n in piece)]
        before = b"".join(b"%d\n" % n for n in numbers)
        before += bytes(-len(before) % BLOCK)
        records += [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", name),
            (b"GNU.sparse.realsize", b"%d" % m.size),
        ]
        size = len(before) + sum(length for _, length in laid)
    write(_header(m, name, m.kind, m.link, size, records) + before)
    return Body(write, -size % BLOCK, Filler(write, m.sparse, laid))


def write_link(write: Callable[[bytes], object], m: Member, name: bytes, target: bytes) -> None:
    """Write `name` as a further name of the member that was written as `target`."""
    write(_header(m, name, b"1", target, 0, []))


def write_end(write: Callable[[bytes], object]) -> None:
    """Write the end of the archive."""
    write(_END)


def _header(
    m: Member,
    name: bytes,
    flag: bytes,
    link: bytes,
    size: int,
    records: list[tuple[bytes, bytes]],
) -> bytes:
    uid, gid = m.uid, m.gid
    if len(name) > 100 and (b"GNU.sparse.name", name) not in records:
        records.append((b"path", name))
    if len(link) > 100:
        records.append((b"linkpath", link))
    if uid > _MOST_ID:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > _MOST_ID:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    if size > _MOST_SIZE:
        records.append((b"size", b"%d" % size))
    # What squashfs can hold: 32 bits without a sign.
    mtime = min(max(m.mtime, 0), (1 << 32) - 1)
    block = _block(name, m.mode & 0o7777, uid, gid, min(size, _MOST_SIZE), mtime, flag, link,
                   m.major, m.minor)  # fmt: skip
    if not records:
        return block
    data = b"".join(_record(key, value) for key, value in records)
    pax = _block(b"pax", 0o644, 0, 0, len(data), 0, b"x", b"", 0, 0)
    return pax + data + bytes(-len(data) % BLOCK) + block


def _block(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, flag: bytes, link: bytes,
    major: int, minor: int,
) -> bytes:  # fmt: skip
    block = _FIELDS.pack(
        name[:100], b"%07o\0" % mode, b"%07o\0" % uid, b"%07o\0" % gid, b"%011o\0" % size,
        b"%011o\0" % mtime, b"        ", flag, link[:100], b"ustar\x0000", b"", b"",
        b"%07o\0" % major, b"%07o\0" % minor, b"",
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _record(key: bytes, value: bytes) -> bytes:
    """A pax record, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(b"%d" % rest)
    length = rest + len(b"%d" % length)
    return b"%d %s=%s\n" % (length, key, value)
