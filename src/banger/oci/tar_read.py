"""Reading tar streams: headers, long names, pax records, sparse files; as bytes, without files.

A scanner of its own, because an image has 100,000 members and the standard library takes 20 times
as long for one. Every length is capped before it is believed. Names stay bytes: nothing says that
they are UTF-8.

Source: POSIX.1-2024 pax (ustar and pax formats), GNU tar manual, "Basic Tar Format" and "Storing
Sparse Files".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from banger.oci.errors import BadImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
REGULAR, HARD_LINK, SYMLINK, CHAR = b"0", b"1", b"2", b"3"
BLOCK_DEVICE, DIRECTORY, FIFO = b"4", b"5", b"6"
"""Kinds of members, by their type flags. Whatever a stream calls a regular file is REGULAR here."""
KNOWN = frozenset((REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO))

_REGULAR_FLAGS = frozenset((b"0", b"\0", b"7", b"S"))
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_META = frozenset((_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL))
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_ZEROS = bytes(BLOCK)
_MOST_META_BYTES = 1 << 20
_MOST_NAME_BYTES = 4096  # PATH_MAX
_MOST_SPARSE = 1 << 16
_XATTR = b"SCHILY.xattr."
_SPARSE_KEYS = frozenset((b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size"))


class Member:
    """One member. `size` is that of its content, `stored` of the data that follows the header.

    `sparse`: pieces (offset, length) of the content that the data consists of; None: all of it.
    """

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime", "name", "ordinal", "size",
        "sparse", "stored", "uid", "xattrs",
    )  # fmt: skip

    ordinal: int
    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime: int
    link: bytes
    major: int
    minor: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    sparse: tuple[tuple[int, int], ...] | None


class TarReader:
    """Members of a tar stream that comes in chunks. After a member, its data can be taken once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._at = 0
        self._left = 0  # of the present member's data
        self._padding = 0
        self._ordinal = -1

    def next(self) -> Member | None:
        """The next member, None at the end of the archive.

        Raises:
            BadImage: it is no tar, is cut off, or breaks a limit.
        """
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        pax: dict[bytes, bytes] = {}
        long_name = long_link = None
        while True:
            header = self._exactly(BLOCK)
            if not header or header == _ZEROS:
                return None  # some writers leave the two blocks of zeros out
            if len(header) < BLOCK:
                raise BadImage("the tar is cut off in a header")
            flag, size = header[156:157], self._check(header)
            if flag not in _META:
                break
            if size > _MOST_META_BYTES:
                raise BadImage(f"a tar header of {size} bytes")
            data = self._exactly(size)
            if len(data) < size:
                raise BadImage("the tar is cut off in a header")
            self._skip(-size % BLOCK)
            if flag == _PAX:
                pax = parse_pax(data)
            elif flag == _LONG_NAME:
                long_name = data.split(b"\0", 1)[0]
            elif flag == _LONG_LINK:
                long_link = data.split(b"\0", 1)[0]
        return self._member(header, flag, size, pax, long_name, long_link)

    def copy_data(self, write: Callable[[bytes], object]) -> None:
        """Give the present member's data (`stored` bytes) to `write`, in pieces.

        Raises:
            BadImage: the stream ends before that.
        """
        while self._left:
            piece = self._some(self._left)
            self._left -= len(piece)
            write(piece)

    def data(self) -> bytes:
        """The present member's data as a whole. The caller has looked at `stored`."""
        pieces: list[bytes] = []
        self.copy_data(pieces.append)
        return b"".join(pieces)

    def forget_data(self) -> None:
        """The present member's data will not come: the source has been moved behind it."""
        self._left = self._padding = 0

    def drain(self) -> None:
        """Read what follows the end of the archive, so that the whole stream was seen."""
        self._buffer = b""
        for _ in self._chunks:
            pass

    # Bytes
    def _some(self, most: int) -> bytes:
        if self._at >= len(self._buffer):
            self._fill()
        piece = self._buffer[self._at : self._at + most]
        self._at += len(piece)
        return piece

    def _fill(self) -> None:
        for chunk in self._chunks:
            if chunk:
                self._buffer, self._at = chunk, 0
                return
        raise BadImage("the tar is cut off in a file")

    def _exactly(self, count: int) -> bytes:
        end = self._at + count
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        parts = [self._buffer[self._at :]]
        have = len(parts[0])
        self._buffer, self._at = b"", 0
        while have < count:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            if have + len(chunk) > count:
                self._buffer, self._at = chunk, count - have
                chunk = chunk[: self._at]
            parts.append(chunk)
            have += len(chunk)
        return b"".join(parts)

    def _skip(self, count: int) -> None:
        while count:
            there = len(self._buffer) - self._at
            if there >= count:
                self._at += count
                return
            count -= there
            self._at = len(self._buffer)
            if count:
                self._fill()

    # Headers
    def _check(self, header: bytes) -> int:
        """The size field of a header whose checksum is right."""
        told = header[148:156]
        total = sum(header) - sum(told) + 8 * 0x20
        if parse_number(told) != total:
            raise BadImage("it is no tar, or damaged: a header's checksum is wrong")
        size = parse_number(header[124:136])
        if size < 0:
            raise BadImage("a tar member has a negative size")
        return size

    def _member(
        self,
        header: bytes,
        flag: bytes,
        size: int,
        pax: dict[bytes, bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Member:
        m = Member()
        self._ordinal += 1
        m.ordinal = self._ordinal
        (name, mode, uid, gid, _, mtime, _, _, link, magic, _, _, major, minor, prefix) = (
            _HEADER.unpack(header)
        )  # fmt: skip
        name = name.split(b"\0", 1)[0]
        if magic == b"ustar\x0000" and prefix[0]:
            name = prefix.split(b"\0", 1)[0] + b"/" + name
        link = link.split(b"\0", 1)[0]
        m.name = name if long_name is None else long_name
        m.link = link if long_link is None else long_link
        m.mode, m.uid, m.gid = parse_number(mode), parse_number(uid), parse_number(gid)
        m.mtime = parse_number(mtime)
        m.major = m.minor = 0
        m.xattrs = ()
        m.sparse = None
        m.kind = REGULAR if flag in _REGULAR_FLAGS else flag
        if flag in (CHAR, BLOCK_DEVICE):
            m.major, m.minor = parse_number(major), parse_number(minor)
        if pax:
            size = _apply_pax(m, pax, size)
        if flag == b"\0" and m.name.endswith(b"/"):
            m.kind = DIRECTORY  # before ustar a directory was a file whose name ends so
        # Only files have data, whatever the size field of the others says (POSIX: it may say).
        self._left = m.stored = m.size = size if m.kind == REGULAR or m.kind not in KNOWN else 0
        self._padding = -m.stored % BLOCK
        if m.kind == REGULAR:
            if flag == b"S":
                self._old_sparse(m, header)
            elif not _SPARSE_KEYS.isdisjoint(pax):
                self._pax_sparse(m, pax)
        if len(m.name) > _MOST_NAME_BYTES or len(m.link) > _MOST_NAME_BYTES:
            raise BadImage(f"a name of more than {_MOST_NAME_BYTES} bytes: {m.name[:60]!r}…")
        if not (0 <= m.uid < 1 << 32 and 0 <= m.gid < 1 << 32):
            raise BadImage(f"{m.name!r} belongs to {m.uid}:{m.gid}")
        return m

    def _old_sparse(self, m: Member, header: bytes) -> None:
        """GNU's first format: the map is in the header and in blocks behind it."""
        pieces = [header[386 + 24 * i : 410 + 24 * i] for i in range(4)]
        more = header[482]
        while more:
            if len(pieces) > _MOST_SPARSE:
                raise BadImage(f"{m.name!r} has too many pieces")
            block = self._exactly(BLOCK)
            if len(block) < BLOCK:
                raise BadImage("the tar is cut off in a header")
            pieces += [block[24 * i : 24 * i + 24] for i in range(21)]
            more = block[504]
        numbers = []
        for piece in pieces:
            if not piece[0] or not piece[12]:
                break
            numbers.append((parse_number(piece[:12]), parse_number(piece[12:])))
        m.size = parse_number(header[483:495])
        m.sparse = _checked_map(m, numbers)

    def _pax_sparse(self, m: Member, pax: dict[bytes, bytes]) -> None:
        """The formats 0.0, 0.1 (map in the records) and 1.0 (map before the data)."""
        if b"GNU.sparse.name" in pax:
            m.name = pax[b"GNU.sparse.name"]
        m.size = _decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size") or b"")
        if pax.get(b"GNU.sparse.major") == b"1":
            numbers = self._map_before_data(m)
        else:
            words = pax.get(b"GNU.sparse.map", b"")
            numbers = [_decimal(w) for w in words.split(b",")] if words else []
        if len(numbers) % 2:
            raise BadImage(f"the map of the sparse file {m.name!r} is damaged")
        m.sparse = _checked_map(m, list(zip(numbers[::2], numbers[1::2], strict=True)))

    def _map_before_data(self, m: Member) -> list[int]:
        # What comes is looked at once: a map may be long, and its sender means no good.
        blocks: list[bytes] = []
        lines = count = 0
        while not blocks or lines < 2 * count + 1:
            if self._left < BLOCK or len(blocks) * BLOCK > _MOST_META_BYTES << 2:
                raise BadImage(f"the map of the sparse file {m.name!r} is damaged")
            block = self._exactly(BLOCK)
            if len(block) < BLOCK:
                raise BadImage("the tar is cut off in a header")
            self._left -= BLOCK
            m.stored -= BLOCK
            if not blocks:
                first, newline, _ = block.partition(b"\n")
                count = _decimal(first) if newline else _MOST_SPARSE + 1
                if count > _MOST_SPARSE:
                    raise BadImage(f"{m.name!r} has too many pieces")
            blocks.append(block)
            lines += block.count(b"\n")
        return [
            _decimal(n) for n in b"".join(blocks).split(b"\n", 2 * count + 1)[1 : 2 * count + 1]
        ]


def parse_number(field: bytes) -> int:
    """A number of a header: octal digits, or GNU's base 256.

    Raises:
        BadImage: neither.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        # Two's complement in what the marker bit leaves.
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError as e:
        raise BadImage(f"a tar header holds {field!r} where a number belongs") from e


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header. Those of GNU's sparse format 0.0, whose keys repeat, become a
    map of format 0.1.

    Raises:
        BadImage: a record's length is wrong.
    """
    records: dict[bytes, bytes] = {}
    pieces: list[bytes] = []
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        length = _decimal(data[at:space]) if space > 0 else 0
        end = at + length
        if length < 5 or end > len(data) or data[end - 1 : end] != b"\n":
            raise BadImage("a pax header is damaged")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise BadImage("a pax header is damaged")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pieces.append(value)
        records[key] = value
        at = end
    if pieces:
        records[b"GNU.sparse.map"] = b",".join(pieces)
    return records


def _apply_pax(m: Member, pax: dict[bytes, bytes], size: int) -> int:
    """Put the records over the header's fields; return the size of the data."""
    for key in (b"path", b"linkpath"):
        if b"\0" in pax.get(key, b""):
            raise BadImage(f"a name holds a NUL byte: {pax[key][:60]!r}")
    if value := pax.get(b"path"):
        m.name = value
    if value := pax.get(b"linkpath"):
        m.link = value
    if value := pax.get(b"uid"):
        m.uid = _decimal(value)
    if value := pax.get(b"gid"):
        m.gid = _decimal(value)
    if value := pax.get(b"mtime"):
        whole = value.split(b".", 1)[0]
        m.mtime = -_decimal(whole[1:]) if whole.startswith(b"-") else _decimal(whole)
    m.xattrs = tuple(
        (key[len(_XATTR) :], value) for key, value in pax.items() if key.startswith(_XATTR)
    )
    return _decimal(pax[b"size"]) if pax.get(b"size") else size


def _decimal(text: bytes) -> int:
    # isdigit: int() would take signs, blanks and underscores.
    if not text.isdigit() or len(text) > 20:
        raise BadImage(f"a pax header holds {text[:30]!r} where a number belongs")
    return int(text)


def _checked_map(m: Member, pieces: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The pieces in order, none beyond the file's end, together as long as the data."""
    if len(pieces) > _MOST_SPARSE:
        raise BadImage(f"{m.name!r} has too many pieces")
    end = total = 0
    for offset, length in pieces:
        if offset < end or length < 0 or offset + length > m.size:
            raise BadImage(f"the map of the sparse file {m.name!r} is damaged")
        end = offset + length
        total += length
    if total != m.stored:
        raise BadImage(f"the map of the sparse file {m.name!r} is damaged")
    return tuple(piece for piece in pieces if piece[1])
