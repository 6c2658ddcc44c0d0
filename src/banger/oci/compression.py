"""Layers and archives as they are stored: gzip, zstd, xz or plain, told apart by their first bytes.

What comes out is hashed on the way and bounded: a few bytes can stand for terabytes.
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from typing import IO, TYPE_CHECKING, Any

from banger import zstd
from banger.oci.errors import BadImage
from banger.units import GIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_READ = 256 << 10
_PIECE = 1 << 20
_GZIP, _ZSTD, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX"
COMPRESSED = (_GZIP, _ZSTD, _XZ)
"""What begins a compressed file, four bytes at most."""
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a zstd frame that holds no data (RFC 8878, 3.1.2)
# What `zstd --long` needs, and what our own limit of memory has room for.
_XZ_MEMORY = 128 << 20


def ceiling_bytes(stored_bytes: int) -> int:
    """How much a layer of this stored size may unpack to.

    Files compress 3 to 10 times, a disk image of zeros 1,000 times: small layers may do that, large
    ones may not.
    """
    return 2 * GIB + 100 * stored_bytes


class LayerStream:
    """The content of a stored layer in pieces. When it has ended, both digests are known."""

    def __init__(self, stream: IO[bytes], *, ceiling: int, check: Callable[[], None]) -> None:
        self._stream = stream
        self._ceiling = ceiling
        self._check = check
        self._stored = hashlib.sha256()
        self._content = hashlib.sha256()
        self._plain = False
        self.stored_bytes = 0
        self.content_bytes = 0

    @property
    def digest(self) -> str:
        return f"sha256:{self._stored.hexdigest()}"

    @property
    def diff_id(self) -> str:
        return self.digest if self._plain else f"sha256:{self._content.hexdigest()}"

    def __iter__(self) -> Iterator[bytes]:
        """Raises BadImage: damaged, cut off, or more than the ceiling."""
        head = self._read()
        if head.startswith(_GZIP):
            pieces = self._inflate(head, "gzip")
        elif head.startswith(_ZSTD) or head[1:4] == _SKIPPABLE:
            pieces = self._inflate(head, "zstd")
        elif head.startswith(_XZ):
            pieces = self._inflate(head, "xz")
        else:
            self._plain = True
            pieces = self._pass(head)
        for piece in pieces:
            self.content_bytes += len(piece)
            if self.content_bytes > self._ceiling:
                raise BadImage(
                    f"{format_size(self.stored_bytes)} unpack to more than "
                    f"{format_size(self._ceiling)}: that is no honest image"
                )
            if not self._plain:
                self._content.update(piece)
            yield piece

    def _read(self) -> bytes:
        self._check()
        data = self._stream.read(_READ)
        self.stored_bytes += len(data)
        self._stored.update(data)
        return data

    def _pass(self, head: bytes) -> Iterator[bytes]:
        data = head
        while data:
            yield data
            data = self._read()

    def _inflate(self, head: bytes, kind: str) -> Iterator[bytes]:
        """One compressed stream after the other: both formats may be concatenated."""
        data = head
        try:
            while data:
                machine = _machine(kind)
                while not machine.eof:
                    if kind == "gzip":
                        piece = machine.decompress(data, _PIECE)
                        data = machine.unconsumed_tail
                    else:
                        piece = machine.decompress(data, _PIECE)
                        data = b""
                    if piece:
                        self._check()
                        yield piece
                    hungry = not data if kind == "gzip" else machine.needs_input
                    if hungry and not machine.eof:
                        data = self._read()
                        if not data and not piece:
                            raise BadImage(f"the {kind} data is cut off")
                data = machine.unused_data or self._read()
                if not data.strip(b"\0"):
                    # Zeros behind the end are padding of some writers, if nothing else follows.
                    while data := self._read():
                        if data.strip(b"\0"):
                            raise BadImage(f"there is something behind the {kind} data")
        except (zlib.error, zstd.ZstdError, lzma.LZMAError) as e:
            raise BadImage(f"the {kind} data is damaged: {e}") from e


def _machine(kind: str) -> Any:
    """What decompresses one stream; those of zstd and xz are alike."""
    if kind == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return zstd.bounded_decompressor()
