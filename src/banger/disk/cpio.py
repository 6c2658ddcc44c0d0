"""cpio archives in the newc format: the only form in which a kernel takes an initramfs.

Writes and reads our own archives. Holds no state. Source: Linux,
Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, BinaryIO

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_HEADER_BYTES = 110
_MAX_FILE_BYTES = (1 << 32) - 1
_MAX_NAME_BYTES = 4096


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of an archive. `mode` holds the file type, as in stat(2)."""

    name: str
    mode: int
    content: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def regular_file(name: str, content: bytes, *, mode: int = 0o644) -> Member:
    return Member(name=name, mode=stat.S_IFREG | mode, content=content)


def directory(name: str, *, mode: int = 0o755) -> Member:
    return Member(name=name, mode=stat.S_IFDIR | mode)


def character_device(name: str, major: int, minor: int, *, mode: int = 0o600) -> Member:
    """A device node. In an archive it is only a record, which needs no privilege to write."""
    return Member(name=name, mode=stat.S_IFCHR | mode, rdev=(major, minor))


class Writer:
    """Writes one archive at the end of a stream. The caller owns the stream and calls `finish`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._written = 0
        self._serial = 0

    def add(self, member: Member) -> None:
        """Append one entry, owned by root, with a fixed time.

        Raises:
            ValueError: the name is absolute, empty or holds `..`; or the content is 4 GiB or more
                (sizes in newc headers have 32 bits).
        """
        check_member_name(member.name)
        if len(member.content) > _MAX_FILE_BYTES:
            raise ValueError(f"{member.name} is too large for an initramfs: 4 GiB or more")
        # Files with one link and no data sharing: the number only has to differ from the others.
        self._serial += 1
        self._entry(self._serial, member)

    def finish(self) -> int:
        """Write the trailer; return the bytes of the whole archive, a multiple of 4."""
        self._entry(0, Member(name=_TRAILER, mode=0))
        return self._written

    def _entry(self, serial: int, member: Member) -> None:
        name = member.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(member.mode) else 1
        fields = (
            serial, member.mode, 0, 0, links, 0, len(member.content), 0, 0, *member.rdev,
            len(name), 0,
        )  # fmt: skip
        self._put(_MAGIC + b"".join(b"%08X" % field for field in fields) + name)
        self._put(member.content)

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        padding = -len(data) % 4
        if padding:
            self._stream.write(bytes(padding))
        # Headers with their names, and contents, each start and end on a multiple of 4, hence a
        # count from zero stays aligned.
        self._written += len(data) + padding


def check_member_name(name: str) -> str:
    """Return `name` unchanged, or refuse what could leave the root of the archive.

    Raises:
        ValueError: as `Writer.add`.
    """
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no name for an initramfs member: relative and plain only")
    if name == _TRAILER or len(name.encode()) >= _MAX_NAME_BYTES:
        raise ValueError(f"{name[:64]!r} is no name for an initramfs member")
    return name


def append_member(initrd: BinaryIO, name: str, content: bytes, *, mode: int = 0o600) -> int:
    """Append one file to an initrd as an archive of its own; return the bytes written.

    The archive starts on a multiple of 4 bytes, the only place where the kernel looks for a header.
    Unpacking is in order, so a later file of the same name wins. The stream must be seekable.

    Raises:
        ValueError: as `Writer.add`.
    """
    check_member_name(name)
    padding = -initrd.seek(0, 2) % 4
    initrd.write(bytes(padding))
    writer = Writer(initrd)
    writer.add(regular_file(name, content, mode=mode))
    return padding + writer.finish()


def read_members(stream: BinaryIO) -> Iterator[Member]:
    """The entries of all archives in a stream that `Writer` and `append_member` made.

    Raises:
        ValueError: the stream is no uncompressed newc archive, or ends too early.
    """
    while True:
        magic = _skip_zeros(stream)
        if magic is None:
            return
        header = magic + _exactly(stream, _HEADER_BYTES - len(magic))
        if not header.startswith(_MAGIC):
            raise ValueError("no newc header where one belongs")
        try:
            fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        except ValueError as e:
            raise ValueError("a newc header holds a field that is no hexadecimal number") from e
        size, name_size = fields[6], fields[11]
        if not 1 < name_size <= _MAX_NAME_BYTES:
            raise ValueError(f"a newc header names a name of {name_size} bytes")
        name = _exactly(stream, name_size)[:-1].decode()
        _exactly(stream, -(_HEADER_BYTES + name_size) % 4)
        content = _exactly(stream, size)
        _exactly(stream, -size % 4)
        if name != _TRAILER:
            yield Member(name=name, mode=fields[1], content=content, rdev=(fields[9], fields[10]))


def _skip_zeros(stream: BinaryIO) -> bytes | None:
    """The first four bytes that are not padding, or None at the end."""
    while word := stream.read(4):
        if word.strip(b"\0"):
            return word
    return None


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("the archive ends within an entry")
    return data
