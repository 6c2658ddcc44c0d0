"""Bundles: tar + zstd of a few files with known names.

Written as plain ustar without times and owners. What is read was hashed before; still the reader
takes exactly the names that it is told, regular files only, each once and no larger than there is
room for. It knows no extension headers, so nothing of a header is ever kept but name and size.

Source: POSIX.1-2017, pax, "ustar Interchange Format"; RFC 8878.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import IO, TYPE_CHECKING, Any, cast

from banger import zstd
from banger.errors import BangerError
from banger.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

_LEVEL = 9
_BLOCK = 512
_READ = 1 << 20
_MOST_UNPACKED_BYTES = 64 * GIB
_ZEROS = bytes(_READ)


class BadBundle(ValueError):
    """The bundle is not what it should be; the message says how."""


def write_bundle(
    write: Callable[[bytes], object],
    members: Mapping[str, Path | bytes],
    *,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Write a bundle of these members in their order; return the sha256 of each.

    `advance` is called with the bytes read so far, and may raise to stop.

    Raises:
        OSError: a file cannot be read. Whatever `write` raises.
    """
    sums = {}
    done = 0
    # Not a file of zstd's own, which would end its frame also when it is given up: a half bundle is
    # never a whole stream.
    out = _Compressing(write)
    with tarfile.open(
        fileobj=cast("IO[bytes]", out), mode="w|", format=tarfile.USTAR_FORMAT, bufsize=_READ
    ) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as f:
                info.size = f.seek(0, io.SEEK_END)
                f.seek(0)

                def seen(count: int) -> None:
                    nonlocal done
                    done += count
                    advance(done)

                reader = _HashingReader(f, seen)
                tar.addfile(info, cast("IO[bytes]", reader))
                sums[name] = reader.digest.hexdigest()
    out.finish()
    return sums


def unpack_bundle(
    archive: IO[bytes],
    target: Path,
    names: Collection[str],
    *,
    require_space: Callable[[int], None],
    check: Callable[[], None],
) -> frozenset[str]:
    """Write the members as new files (0444) into `target`; return the names that were there.

    `require_space` is told a member's size before it is written, and may refuse; `check` is called
    between two buffers.

    Raises:
        BadBundle: another name, a name twice, no regular file, damaged, cut off or too large.
        OSError: disk full and the like. The caller removes what was written.
    """
    stream = _Content(archive, check)
    found: set[str] = set()
    total = 0
    while (header := stream.exactly(_BLOCK)) != bytes(_BLOCK):
        name, size = _parse_header(header)
        if name not in names:
            raise BadBundle(f"it holds {name[:80]!r}, which does not belong there")
        if name in found:
            raise BadBundle(f"it holds {name} twice")
        found.add(name)
        total += size
        if total > _MOST_UNPACKED_BYTES:
            raise BadBundle(f"it unpacks to more than {_MOST_UNPACKED_BYTES} bytes")
        require_space(size)
        path = target / name
        with path.open("xb") as f:
            left = size
            while left:
                piece = stream.exactly(min(left, _READ))
                left -= len(piece)
                if piece == _ZEROS:
                    f.seek(len(piece), io.SEEK_CUR)  # a file with holes gets them back
                else:
                    f.write(piece)
            f.truncate(size)
        path.chmod(0o444)
        stream.exactly(-size % _BLOCK)
    return frozenset(found)


def bad_bundle(doing: str, e: Exception) -> BangerError:
    """What a service tells the user about a BadBundle."""
    return BangerError("operation_failed", f"{doing}: {e}", reason="bad_bundle")


def _parse_header(header: bytes) -> tuple[str, int]:
    """Name and size of a regular file; everything else is refused."""
    try:
        told = int(header[148:156].rstrip(b" \0"), 8)
        size = int(header[124:136].rstrip(b" \0"), 8)
    except ValueError as e:
        raise BadBundle("a tar header is damaged") from e
    if told != sum(header) - sum(header[148:156]) + 8 * ord(" ") or header[257:262] != b"ustar":
        raise BadBundle("a tar header is damaged")
    name = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
    if header[156:157] not in (b"0", b"\0") or header[157:257].strip(b"\0"):
        raise BadBundle(f"{name[:80]!r} is no regular file")
    # Behind the numbers of a device GNU tar keeps times, POSIX a prefix of the name.
    if header[345:500].strip(b"\0"):
        raise BadBundle(f"{name[:80]!r} has a longer name than any member")
    if size < 0:
        raise BadBundle("a tar header is damaged")
    return name, size


class _Content:
    """The uncompressed bytes of one zstd stream, asked for in exact amounts."""

    def __init__(self, source: IO[bytes], check: Callable[[], None]) -> None:
        self._source = source
        self._check = check
        self._machine = zstd.bounded_decompressor()
        self._buffer = bytearray()

    def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._check()
            self._more()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _more(self) -> None:
        if self._machine.eof:
            raise BadBundle("it is cut off")
        data = b""
        if self._machine.needs_input and not (data := self._source.read(_READ)):
            raise BadBundle("it is cut off")
        try:
            # At most so much at once, however much a few bytes stand for.
            self._buffer += self._machine.decompress(data, _READ)
        except zstd.ZstdError as e:
            raise BadBundle(f"its zstd data is damaged: {e}") from e


class _Compressing(io.RawIOBase):
    """What is written goes out compressed; the end has to be asked for."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._machine = zstd.ZstdCompressor(level=_LEVEL)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if piece := self._machine.compress(data):
            self._write(piece)
        return len(data)

    def finish(self) -> None:
        self._write(self._machine.flush())


class _HashingReader:
    """Hashes what is read on its way, and says how much it was."""

    def __init__(self, source: IO[bytes], seen: Callable[[int], None]) -> None:
        self._source = source
        self._seen = seen
        self.digest = hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        data = self._source.read(count)
        self.digest.update(data)
        self._seen(len(data))
        return data
