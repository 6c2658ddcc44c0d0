"""zstd: in the standard library from Python 3.14 on, before that its backport. Imported here only.

Whoever reads foreign data takes `bounded_decompressor`, which refuses streams that ask for more
memory than an honest writer's do.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
        ZstdFile,
        compress,
    )
else:
    from backports.zstd import (
        CompressionParameter,
        DecompressionParameter,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
        ZstdFile,
        compress,
    )

__all__ = [
    "CompressionParameter",
    "ZstdCompressor",
    "ZstdDecompressor",
    "ZstdError",
    "ZstdFile",
    "bounded_decompressor",
    "compress",
]

# 2^27 = 128 MiB of memory, what `zstd --long` needs.
_WINDOW_LOG_MAX = 27


def bounded_decompressor() -> ZstdDecompressor:
    """One stream's decompressor, whose window has at most 128 MiB; a larger one is a ZstdError."""
    options: dict[int, int] = {DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
    return ZstdDecompressor(options=options)
