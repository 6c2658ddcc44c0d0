"""Files from a guest land on the host: below one directory, and nowhere else.

Every component is opened by descriptor with O_NOFOLLOW, so neither a link that the guest sends nor
one that lies there already leads anywhere. A file gets its final name when it is whole. Owner is
the caller; of a mode the permission bits count. A `Landing` holds one descriptor a directory level
until it is closed.

One that is `durable` gives names only to what is on the disk, so that a power cut leaves the old
file or the new one and not a shorter one. That is asked for once for many files, which wait under
temporary names: 2000 small files took 2.4 s on ext4, against 0.2 s without and 11 s one by one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Self

from banger.errors import BangerError
from banger.files import sync_filesystem
from banger.workspace.names import MAX_DEPTH, format_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK = 1 << 20
_MOST_WAITING = 1000
_MOST_WAITING_BYTES = 64 << 20


class Landing:
    """Writes below `root`. Names are lists of components (`tar_reader.split_name`)."""

    def __init__(self, root: Path, doing: str, *, durable: bool = False) -> None:
        self._doing = doing
        self._durable = durable
        # Final names and their temporary ones, in the order in which they came.
        self._waiting: dict[tuple[bytes, ...], bytes] = {}
        self._waiting_bytes = 0
        self._fds = [os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._parts: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._settle()
            else:
                # What has come is whole: the next copy need not fetch it again.
                with contextlib.suppress(BangerError):
                    self._settle()
        finally:
            while self._fds:
                os.close(self._fds.pop())

    def _settle(self) -> None:
        """Names for what waits, once it is on the disk. What fails loses its temporary name."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if not waiting:
            return
        left = list(waiting.items())
        try:
            sync_filesystem(self._fds[0])
            while left:
                parts, temporary = left[0]
                directory = self.directory(list(parts[:-1]))
                os.rename(temporary, parts[-1], src_dir_fd=directory, dst_dir_fd=directory)
                _discard(directory, temporary)
                left.pop(0)
        except OSError as e:
            raise self._error(list(left[0][0]), e.strerror or str(e), e.errno) from e
        finally:
            for parts, temporary in left:
                with contextlib.suppress(BangerError):
                    _discard(self.directory(list(parts[:-1])), temporary)

    def directory(self, parts: list[bytes]) -> int:
        """A descriptor of the directory, made where it is missing; valid until the next call.

        Raises:
            BangerError: a component is a link or a file.
        """
        if len(parts) > MAX_DEPTH:
            raise self._error(parts, "it is nested too deep")
        same = 0
        for old, new in zip(self._parts, parts, strict=False):
            if old != new:
                break
            same += 1
        while len(self._parts) > same:
            os.close(self._fds.pop())
            self._parts.pop()
        for part in parts[same:]:
            try:
                self._fds.append(self._enter(self._fds[-1], part))
            except OSError as e:
                known = e.errno in (errno.ENOTDIR, errno.ELOOP)
                why = "a link or a file is in the way" if known else e.strerror or str(e)
                raise self._error([*self._parts, part], why) from e
            self._parts.append(part)
        return self._fds[-1]

    @staticmethod
    def _enter(above: int, part: bytes) -> int:
        with contextlib.suppress(FileNotFoundError):
            return os.open(part, _DIRECTORY, dir_fd=above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o755, dir_fd=above)
        return os.open(part, _DIRECTORY, dir_fd=above)

    def find_file(self, parts: list[bytes]) -> int | None:
        """A descriptor of a regular file that is there, and the caller's; None where there is none,
        or only behind a link. Nothing is made."""
        above = self._fds[0]
        opened: list[int] = []
        try:
            for part in parts[:-1]:
                above = os.open(part, _DIRECTORY, dir_fd=above)
                opened.append(above)
            fd = os.open(parts[-1], _LOOK, dir_fd=above)
        except OSError:
            return None
        finally:
            for one in opened:
                os.close(one)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None

    def file(
        self, parts: list[bytes], size: int, read: Callable[[int], bytes], *, mode: int
    ) -> None:
        """Write a file of `size` bytes from `read(at most)`, in place of what has the name.

        Raises:
            BangerError: `read` ended early, or the name cannot be written; the old file is intact.
        """

        def fill(directory: int, temporary: bytes) -> None:
            fd = os.open(temporary, _NEW, 0o600, dir_fd=directory)
            try:
                left = size
                while left and (chunk := read(min(left, _CHUNK))):
                    _write_all(fd, chunk)
                    left -= len(chunk)
                if left:
                    raise self._error(parts, "its content is cut")
                os.fchmod(fd, mode & 0o777)
            finally:
                os.close(fd)

        self._place(parts, fill, size)

    def symlink(self, parts: list[bytes], target: bytes) -> None:
        """Make a link, as it is; it is never followed here. Raises as `file`."""
        if not target or b"\0" in target:
            raise self._error(parts, "it is a link without a target")
        self._place(parts, lambda fd, name: os.symlink(target, name, dir_fd=fd))

    def hardlink(self, parts: list[bytes], to: list[bytes]) -> None:
        """A second name of a file that landed before. Raises as `file`."""
        if not to:
            raise self._error(parts, "it is a link without a target")
        source = os.dup(self.directory(to[:-1]))
        there = self._waiting.get(tuple(to), to[-1])
        try:
            self._place(
                parts,
                lambda fd, name: os.link(
                    there, name, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False
                ),
            )
        finally:
            os.close(source)

    def move_in(self, source: Landing, parts: list[bytes]) -> None:
        """Move a file of the same name from another landing, on the same filesystem. Raises as
        `file`."""
        try:
            os.rename(
                parts[-1],
                parts[-1],
                src_dir_fd=source.directory(parts[:-1]),
                dst_dir_fd=self.directory(parts[:-1]),
            )
        except OSError as e:
            raise self._error(parts, e.strerror or str(e), e.errno) from e

    def set_directory_mode(self, parts: list[bytes], mode: int) -> None:
        """Permission bits of a directory that is there; what is inside stays reachable for us."""
        os.fchmod(self.directory(parts), (mode & 0o777) | stat.S_IRWXU)

    def _place(self, parts: list[bytes], fill: Callable[[int, bytes], None], size: int = 0) -> None:
        if not parts:
            raise self._error(parts, "it has no name")
        temporary = b".banger-" + os.urandom(6).hex().encode()
        try:
            directory = self.directory(parts[:-1])
            try:
                fill(directory, temporary)
                if not self._durable:
                    os.rename(temporary, parts[-1], src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                _discard(directory, temporary)
                raise
            if not self._durable:
                _discard(directory, temporary)
                return
        except OSError as e:
            raise self._error(parts, e.strerror or str(e), e.errno) from e
        if (older := self._waiting.pop(tuple(parts), None)) is not None:
            _discard(directory, older)
        self._waiting[tuple(parts)] = temporary
        self._waiting_bytes += size
        if len(self._waiting) >= _MOST_WAITING or self._waiting_bytes >= _MOST_WAITING_BYTES:
            self._settle()

    def _error(self, parts: list[bytes], why: str, number: int | None = None) -> BangerError:
        return BangerError(
            "operation_failed",
            f"{self._doing}: writing {format_name(b'/'.join(parts))}: {why}",
            reason="disk_full" if number == errno.ENOSPC else None,
        )


def _discard(directory: int, temporary: bytes) -> None:
    """Also after a rename: of two names of one file it leaves both (rename(2))."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
