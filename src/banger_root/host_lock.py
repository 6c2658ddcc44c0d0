"""The lock between all helpers of this host, because links and nft tables are everybody's.

Held for the milliseconds in which a lease is made or given back. The file goes with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = "/run/banger-root.lock"


@contextlib.contextmanager
def host_lock() -> Iterator[None]:
    """Hold the lock; blocks until it is ours.

    Raises:
        HelperError: the lock file cannot be opened.
    """
    fd = _acquire()
    try:
        yield
    finally:
        # Unlinked while held: who waits on this inode sees that it lost its name, and starts over.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(PATH)
        os.close(fd)


def _acquire() -> int:
    while True:
        try:
            fd = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise HelperError("operation_failed", f"opening {PATH}: {e.strerror}") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(PATH, follow_symlinks=False)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
