"""The compressions of kernel packages: xz, zstd and gzip, told apart by their magic numbers."""

from __future__ import annotations

import gzip
import lzma
import zlib
from typing import IO, BinaryIO, cast

from banger import zstd

_MAGICS = {b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}


def find_compression(head: bytes) -> str | None:
    """`xz`, `zstd` or `gzip` by the first bytes of the data, else None."""
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            return name
    return None


def decompress(data: bytes, *, limit_bytes: int) -> bytes:
    """The content of the first compressed stream in `data`; what follows it is not looked at.

    Raises:
        ValueError: no known compression, damaged or cut off, or larger than `limit_bytes`.
    """
    name = find_compression(data)
    try:
        if name == "xz":
            xz = lzma.LZMADecompressor()
            out = xz.decompress(data, max_length=limit_bytes + 1)
            done = xz.eof
        elif name == "zstd":
            zs = zstd.ZstdDecompressor()
            out = zs.decompress(data, max_length=limit_bytes + 1)
            done = zs.eof
        elif name == "gzip":
            gz = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            out = gz.decompress(data, limit_bytes + 1)
            done = gz.eof
        else:
            raise ValueError(f"the data begins with {data[:6].hex()}: not xz, zstd or gzip")
    except (lzma.LZMAError, zstd.ZstdError, zlib.error) as e:
        raise ValueError(f"the {name} data is damaged: {e}") from e
    if len(out) > limit_bytes:
        raise ValueError(f"the {name} data unpacks to more than {limit_bytes} bytes")
    if not done:
        raise ValueError(f"the {name} data is cut off")
    return out


def open_decompressed(stream: BinaryIO, name: str) -> IO[bytes]:
    """A readable stream of the content; `name` is a file name whose ending tells the compression.

    Raises:
        ValueError: an ending that no Debian package uses.
    """
    if name.endswith(".xz"):
        return cast("IO[bytes]", lzma.LZMAFile(stream))
    if name.endswith(".zst"):
        return cast("IO[bytes]", zstd.ZstdFile(stream))
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stream))
    if name.endswith(".tar"):
        return stream
    raise ValueError(f"{name} has an unknown compression")
