"""A filesystem of a few MiB in a mount namespace of the test's own, filled to the page.

Each page more that is free lets the code under test come one write further before the disk is full,
so trying again with a little more room each time makes each of its writes fail once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from banger.errors import BangerError, find_disk_full

T = TypeVar("T")

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 16384, 1 << 18, 2
_PAGE = 4096
_FILLER = ".filler"
_libc = ctypes.CDLL(None, use_errno=True)


def find_obstacle() -> str | None:
    """The capability that this host lacks for mounts of a test's own, or None."""
    if os.geteuid() != 0:
        return "needs root to mount a small filesystem"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return "needs CAP_SYS_ADMIN to make mount namespaces" if done.returncode else None


class SmallDisk:
    """A mounted tmpfs. What lies on it at the end goes with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, pages: int) -> None:
        """Fill it up to so many free pages."""
        self.empty()
        fill = os.statvfs(self.path).f_bfree - pages
        if fill > 0:
            fd = os.open(self.path / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, 0, fill * _PAGE)
            finally:
                os.close(fd)

    def empty(self) -> None:
        """Take back what `leave` filled it with."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Every file and directory on it, but for locks, logs, and what is SQLite's own."""
        return {
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if not path.name.endswith((".lock", ".log", "-wal", "-shm", ".db.room"))
            and path.name not in (".lock", _FILLER)
        }

    async def fill_at_each_write(
        self, attempt: Callable[[], Awaitable[T]], seen: Callable[[], object]
    ) -> T:
        """Attempt it with ever more room, until it works; return what it gave.

        Each failure must say that the disk is full and what to type, and change nothing of `seen`.
        """
        pages = failures = 0
        while True:
            before = seen()
            self.leave(pages)
            try:
                result = await attempt()
            except (BangerError, OSError) as e:
                told = find_disk_full(e, doing="trying")
                assert told is not None, f"with {pages} pages: {e!r}, from {e.__cause__!r}"
                assert told.reason == "disk_full", f"with {pages} pages: {told.reason}"
                assert told.hint, told
                self.empty()
                after = seen()
                assert after == before, f"with {pages} pages ({e}): {before} became {after}"
                failures += 1
            else:
                self.empty()
                assert failures > 0, "it writes nothing here"
                return result
            pages = max(pages + 1, pages * 9 // 8)
            assert pages < 1 << 16


@contextmanager
def small_disk(point: Path, size_mib: int = 64) -> Iterator[SmallDisk]:
    """A tmpfs at `point`, which this thread and the threads and programs that it starts can see."""
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    here = os.getcwd()
    try:
        _check(_libc.unshare(_CLONE_NEWNS))
        try:
            _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
            options = f"size={size_mib}m".encode()
            _check(_libc.mount(b"small", os.fsencode(point), b"tmpfs", 0, options))
            try:
                yield SmallDisk(point)
            finally:
                shutil.rmtree(point, ignore_errors=True)
                _check(_libc.umount2(os.fsencode(point), _MNT_DETACH))
        finally:
            _check(_libc.setns(before, _CLONE_NEWNS))
            os.chdir(here)
    finally:
        os.close(before)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
