"""What an interrupted copy left on this host of a file or a directory; there the next one goes on.

It lies beside its target under a name of its own, locked while somebody is at it, and gets the
target's name when it is whole. One that nobody goes on with is removed a week later, by the next
copy into that directory; so is what a killed process left of a small file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from typing import TYPE_CHECKING, Self

from banger.errors import BangerError
from banger.files import sync_filesystem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OURS = re.compile(rb"\.banger-(part-[0-9a-f]{32}|[0-9a-f]{12})")
_KEPT_S = 7 * 24 * 3600
_TRIES = 10
_CHUNK = 1 << 20


def part_name(name: bytes) -> bytes:
    """The name beside `name` under which it is gathered."""
    return b".banger-part-" + hashlib.sha256(name).hexdigest()[:32].encode()


@contextlib.contextmanager
def gathered(target: Path) -> Iterator[Path]:
    """A directory for what shall be at `target`: itself when it is there, else one beside it that
    gets its name when the block ends well, and stays for the next copy when it does not.

    Raises:
        OSError: as mkdir(2) and rename(2); somebody else's directory is in the way.
    """
    if os.path.lexists(target):
        yield target
        return
    above = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_old(above)
        part = part_name(os.fsencode(target.name))
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, dir_fd=above)
        st = os.stat(part, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid():
            raise FileExistsError(errno.EEXIST, "something of that name is in the way", part)
        yield target.parent / os.fsdecode(part)
        inside = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        try:
            sync_filesystem(inside)  # as for a file: a name for what is on the disk
        finally:
            os.close(inside)
        # mkdir first: rename(2) would replace an empty directory, nothing else.
        os.mkdir(target.name, dir_fd=above)
        os.rename(part, target.name, src_dir_fd=above, dst_dir_fd=above)
    finally:
        os.close(above)


class Partial:
    """The part of the file `name` in a directory. It closes with its context, and stays on disk
    until it is placed; an empty one does not.

    Raises:
        BangerError: in_use: another copy to that name is under way.
        OSError: it cannot be made.
    """

    def __init__(self, directory: int, name: bytes) -> None:
        self._target = name
        self._name = part_name(name)
        self._directory = os.dup(directory)
        try:
            _remove_old(self._directory)
            self._fd = self._open()
        except BaseException:
            os.close(self._directory)
            raise
        self.size = os.fstat(self._fd).st_size
        self._placed = False

    def _open(self) -> int:
        for _ in range(_TRIES):
            fd = os.open(self._name, _FLAGS, 0o600, dir_fd=self._directory)
            try:
                if self._hold(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        raise OSError(f"somebody keeps exchanging {os.fsdecode(self._name)}")

    def _hold(self, fd: int) -> bool:
        """Whether it is locked, and is the file of that name, and nobody else's."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BangerError(
                "already_exists",
                f"another copy to {os.fsdecode(self._target)} is under way",
                reason="in_use",
            ) from e
        st = os.fstat(fd)
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino):
                if stat.S_ISREG(st.st_mode) and st.st_nlink == 1 and st.st_uid == os.geteuid():
                    return True
                os.unlink(self._name, dir_fd=self._directory)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if not self._placed and not os.fstat(self._fd).st_size:
                os.unlink(self._name, dir_fd=self._directory)
        finally:
            os.close(self._fd)
            os.close(self._directory)

    def sha256(self) -> bytes:
        """Of what is there."""
        hashed = hashlib.sha256()
        at = 0
        while chunk := os.pread(self._fd, _CHUNK, at):
            hashed.update(chunk)
            at += len(chunk)
        return hashed.digest()

    def restart(self) -> None:
        """Forget what is there."""
        os.ftruncate(self._fd, 0)
        self.size = 0

    def free_bytes(self) -> int:
        """What the filesystem has left for us."""
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize

    def write(self, chunk: bytes) -> None:
        """Go on by some bytes."""
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self._fd, view, self.size)
            self.size += written
            view = view[written:]

    def place(self, mode: int) -> None:
        """It is whole: it gets permission bits and its name, in place of what has it."""
        os.fchmod(self._fd, mode & 0o777)
        # A name for what is on the disk: after a power cut it is not a shorter file.
        os.fsync(self._fd)
        os.rename(self._name, self._target, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._placed = True


def _remove_old(directory: int) -> None:
    now = time.time()
    with os.scandir(directory) as entries:
        names = [n for e in entries if _OURS.fullmatch(n := os.fsencode(e.name))]
    for name in names:
        with contextlib.suppress(OSError):
            fd = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
            )
            try:
                st = os.fstat(fd)
                if now - st.st_mtime <= _KEPT_S or st.st_uid != os.geteuid():
                    continue
                if stat.S_ISDIR(st.st_mode):
                    shutil.rmtree(name, dir_fd=directory)
                elif stat.S_ISREG(st.st_mode):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
            finally:
                os.close(fd)
