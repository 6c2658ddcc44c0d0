"""Debian packages, read without dpkg: an ar archive that holds a compressed tar.

Nothing is installed and no script of the package runs. Source: deb(5), ar(5).
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from typing import TYPE_CHECKING, BinaryIO

from banger.kernel.compression import open_decompressed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


@contextlib.contextmanager
def open_package_data(package: Path) -> Iterator[tarfile.TarFile]:
    """The file tree of a .deb as a tar stream, to be read once from front to end.

    Raises:
        ValueError: no Debian package. tarfile.TarError, OSError, lzma.LZMAError: a damaged one.
    """
    with package.open("rb") as f:
        name, section = _find_data(f)
        with (
            open_decompressed(io.BufferedReader(section, 1 << 18), name) as content,
            tarfile.open(fileobj=content, mode="r|", bufsize=1 << 18) as tar,
        ):
            yield tar


def _find_data(f: BinaryIO) -> tuple[str, _Section]:
    if f.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("it is no Debian package: no ar archive")
    while header := f.read(_AR_HEADER_BYTES):
        if len(header) != _AR_HEADER_BYTES or header[58:] != b"`\n":
            raise ValueError("the ar archive is damaged")
        name = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
        size = int(header[48:58])
        if name.startswith("data.tar"):
            return name, _Section(f, size)
        f.seek(size + size % 2, io.SEEK_CUR)  # members start on even offsets
    raise ValueError("the Debian package holds no data.tar member")


class _Section(io.RawIOBase):
    """The next `size` bytes of a file as a stream of their own."""

    def __init__(self, f: BinaryIO, size: int) -> None:
        self._f = f
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type] # any writable buffer, as io has it
        data = self._f.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)
