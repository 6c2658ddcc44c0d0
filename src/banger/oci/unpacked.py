"""Archives that are compressed as a whole, unpacked to a file of their own for one pull.

`docker save | gzip` makes them. Members are read at random and twice, which no compressed stream
allows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from banger import files
from banger.errors import BangerError
from banger.oci.compression import COMPRESSED, LayerStream, ceiling_bytes
from banger.oci.errors import reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.oci.work import Work


@contextlib.contextmanager
def unpacked_archive(path: Path, scratch: Path, prefix: str, *, work: Work) -> Iterator[Path]:
    """The archive itself where it is a plain tar or a directory, else a copy that is one.

    The copy is in a directory of its own below `scratch`, whose name begins with `prefix`, and is
    removed when the block is left.

    Raises:
        BangerError: not_found; operation_failed, reason bad_image: damaged, or larger than an
            honest archive of its size can be.
    """
    try:
        if path.is_dir():
            yield path
            return
        source = path.open("rb")
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        raise BangerError(
            "not_found" if missing else "operation_failed",
            f"opening the archive {path}: {e.strerror}",
            hint=f"ls -l {path}",
        ) from e
    with source:
        if not source.read(4).startswith(COMPRESSED):
            yield path
            return
        source.seek(0)
        work.stage("image", f"unpacking {path.name}")
        with files.staging_directory(scratch, prefix) as staging:
            plain = staging / "archive.tar"
            ceiling = ceiling_bytes(path.stat().st_size)
            stream = LayerStream(source, ceiling=ceiling, check=work.check)
            with plain.open("xb") as out, reading(f"the archive {path}"):
                for piece in stream:
                    out.write(piece)
            yield plain
