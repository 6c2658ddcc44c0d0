"""Reads the tar stream of a party that is not trusted, one member at a time.

Names are bytes. Lengths are checked before anything is read for them: a name or link target has at
most 4095 bytes, a record before a header 64 KiB. GNU long names and pax records (`path`,
`linkpath`, `size`) are understood, other records are skipped. Owns nothing: the stream is the
caller's, and what of a member is not read is skipped when the next one is asked for.

Source: tar(5); pax, POSIX.1-2017 "pax Interchange Format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

from banger.errors import BangerError
from banger.workspace.names import format_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 512
_MAX_NAME = 4095
_MAX_RECORD = 64 << 10
_CHUNK = 1 << 20

Kind = Literal["file", "directory", "symlink", "hardlink", "character", "other"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "directory", b"2": "symlink",
    b"1": "hardlink", b"3": "character",
}  # fmt: skip


class Member(NamedTuple):
    """One member. `mode` is permission bits; `link` the target of a link."""

    name: bytes
    kind: Kind
    mode: int
    size: int
    mtime: int
    link: bytes


class TarReader:
    """Iterate for members; `read` gives the content of the last one."""

    def __init__(self, stream: BinaryIO, doing: str) -> None:
        self._in = stream
        self._doing = doing
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def read(self, most: int) -> bytes:
        """The next bytes of the member; empty at its end.

        Raises:
            BangerError: the stream ended within it.
        """
        if self._left == 0:
            return b""
        data = self._in.read(min(most, self._left))
        if not data:
            raise self._bad("the tar is cut")
        self._left -= len(data)
        return data

    def _next(self) -> Member | None:
        name = link = None
        size: int | None = None
        while True:
            header = self._header()
            if header is None:
                return None
            flag = header[156:157]
            length = self._number(header[124:136])
            if flag in b"LKx":
                record = self._record(length)
                if flag == b"L":
                    name = record.rstrip(b"\0")
                elif flag == b"K":
                    link = record.rstrip(b"\0")
                else:
                    fields = self._pax(record)
                    name = fields.get(b"path", name)
                    link = fields.get(b"linkpath", link)
                    if b"size" in fields:
                        size = self._decimal(fields[b"size"])
                continue
            if flag == b"g":
                self._record(length)
                continue
            kind = _KINDS.get(flag, "other")
            if name is None:
                name = self._plain_name(header)
            if link is None:
                link = header[157:257].partition(b"\0")[0]
            if kind == "file" and name.endswith(b"/"):
                kind = "directory"
            self._left = (length if size is None else size) if kind == "file" else 0
            self._padding = -self._left % _BLOCK
            if not 0 < len(name) <= _MAX_NAME or len(link) > _MAX_NAME:
                raise self._bad("a name of no or too many bytes")
            return Member(
                name=name,
                kind=kind,
                mode=self._number(header[100:108]) & 0o7777,
                size=self._left,
                mtime=self._number(header[136:148]),
                link=link,
            )

    def _header(self) -> bytes | None:
        while self._left:
            self.read(_CHUNK)
        self._skip(self._padding)
        self._padding = 0
        block = self._exactly(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        # The checksum counts its own field as eight spaces.
        if sum(block) - sum(block[148:156]) + 8 * 0x20 != self._number(block[148:156]):
            raise self._bad("a damaged header")
        return block

    def _record(self, length: int) -> bytes:
        if length > _MAX_RECORD:
            raise self._bad(f"a record of {length} bytes")
        record = self._exactly(length)
        self._skip(-length % _BLOCK)
        return record

    def _pax(self, record: bytes) -> dict[bytes, bytes]:
        fields = {}
        while record:
            digits, _, _ = record.partition(b" ")
            length = self._decimal(digits)
            key, equals, value = record[len(digits) + 1 : length].partition(b"=")
            if length <= len(digits) or not equals or not value.endswith(b"\n"):
                raise self._bad("a malformed pax record")
            fields[key] = value[:-1]
            record = record[length:]
        return fields

    @staticmethod
    def _plain_name(header: bytes) -> bytes:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return prefix + b"/" + name if prefix else name

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        if field[0] == 0xFF:
            return 0  # a time before 1970
        digits = field.strip(b"\0 ")
        if not digits.isdigit() and digits:
            raise self._bad("a malformed number")
        try:
            return int(digits or b"0", 8)
        except ValueError as e:
            raise self._bad("a malformed number") from e

    def _decimal(self, digits: bytes) -> int:
        if not digits.isdigit() or len(digits) > 20:
            raise self._bad("a malformed pax record")
        return int(digits)

    def _skip(self, count: int) -> None:
        if count:
            self._exactly(count)

    def _exactly(self, count: int) -> bytes:
        data = self._in.read(count)
        while len(data) < count:
            more = self._in.read(count - len(data))
            if not more:
                raise self._bad("the tar is cut")
            data += more
        return data

    def _bad(self, why: str) -> BangerError:
        return BangerError("operation_failed", f"{self._doing}: {why}")


def split_name(name: bytes, doing: str) -> list[bytes]:
    """The components of a member's name, none for the root itself.

    Raises:
        BangerError: it is absolute, or leads above its root.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name:
        raise BangerError(
            "operation_failed", f"{doing}: the name {format_name(name)} leads out of its directory"
        )
    return parts
