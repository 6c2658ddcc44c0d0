"""Files of a git directory that we read ourselves: plain ones only, never through a link.

The directory is hostile input: what has the name of a file may be a FIFO, which would block, or a
directory.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, BinaryIO

from banger.errors import BangerError

if TYPE_CHECKING:
    from pathlib import Path


def open_plain(path: Path) -> BinaryIO | None:
    """The file, which the caller closes; None where nothing has the name.

    Raises:
        BangerError: it is a link or no plain file, or cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "its name holds a NUL"
        if isinstance(e, OSError) and e.errno in (errno.ELOOP, errno.ENXIO):
            why = "it is not a plain file"
        raise BangerError("operation_failed", f"reading {path}: {why}") from e
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise BangerError("operation_failed", f"reading {path}: it is not a plain file")


def find_start(path: Path, most: int) -> bytes | None:
    """The first `most` bytes of a plain file; None where there is none that can be read."""
    try:
        f = open_plain(path)
    except BangerError:
        return None
    if f is None:
        return None
    with f:
        return f.read(most)
