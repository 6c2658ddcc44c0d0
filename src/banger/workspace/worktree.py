"""The user's files, opened by descriptor and never through a symlink.

Between git's listing and our reading anybody may replace a directory by a link to somewhere else;
every component is therefore opened with O_NOFOLLOW below the root's descriptor. A `WorkTree` holds
one descriptor for each component of the directory it was last asked about, until it is closed.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from typing import TYPE_CHECKING, Self

from banger.errors import BangerError
from banger.workspace.names import MAX_DEPTH, format_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should the file turn into a FIFO after lstat, open must not wait for a writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class WorkTree:
    """Files below one directory. Names are relative, checked (`check_name`), in bytes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fds = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._parts: list[bytes] = []
        self._directory: bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def find(self, name: bytes) -> os.stat_result | None:
        """lstat of a name; None when nothing is there, or only through a symlink."""
        directory, _, base = name.rpartition(b"/")
        fd = self._enter(directory)
        if fd is None:
            return None
        try:
            return os.stat(base, dir_fd=fd, follow_symlinks=False)
        except OSError as e:
            if e.errno in _ABSENT:
                return None
            raise self._error(name, e) from e

    def open(self, name: bytes) -> int | None:
        """A descriptor of the regular file that `find` has just seen; None if it is gone.

        The caller closes it, and looks with fstat at what it got.
        """
        directory, _, base = name.rpartition(b"/")
        fd = self._enter(directory)
        if fd is None:
            return None
        try:
            return os.open(base, _FILE, dir_fd=fd)
        except OSError as e:
            if e.errno in _ABSENT:
                return None
            raise self._error(name, e) from e

    def read_link(self, name: bytes) -> bytes | None:
        """The target of a symlink; None when it is gone or something else by now."""
        directory, _, base = name.rpartition(b"/")
        fd = self._enter(directory)
        if fd is None:
            return None
        try:
            return os.readlink(base, dir_fd=fd)
        except OSError as e:
            if e.errno in (*_ABSENT, errno.EINVAL):
                return None
            raise self._error(name, e) from e

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Everything below the root except `.git` and what is in it: name and file type
        (`stat.S_IFMT`), each directory before its content, sorted.

        A `.git` is reported (as a directory, a file or a link) but not entered.
        """
        waiting: list[bytes] = [b""]
        while waiting:
            directory = waiting.pop()
            fd = self._enter(directory)
            if fd is None:
                continue
            if directory:
                yield directory, stat.S_IFDIR
            inside = []
            for base, kind in self._list(directory, fd):
                name = b"/".join((directory, base)) if directory else base
                if kind == stat.S_IFDIR and base.lower() != b".git":
                    if name.count(b"/") >= MAX_DEPTH - 1:
                        raise BangerError(
                            "bad_request",
                            f"{format_name(name)} is nested more than {MAX_DEPTH} deep",
                        )
                    inside.append(name)
                else:
                    yield name, kind
            waiting.extend(reversed(inside))

    def _list(self, directory: bytes, fd: int) -> list[tuple[bytes, int]]:
        # O_PATH descriptors cannot be read from.
        try:
            readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        except OSError as e:
            raise self._error(directory, e) from e
        try:
            with os.scandir(readable) as found:
                return sorted(
                    (os.fsencode(e.name), stat.S_IFMT(e.stat(follow_symlinks=False).st_mode))
                    for e in found
                )
        finally:
            os.close(readable)

    def _enter(self, directory: bytes) -> int | None:
        if directory == self._directory:
            return self._fds[-1]
        parts = directory.split(b"/") if directory else []
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
                self._fds.append(os.open(part, _DIRECTORY, dir_fd=self._fds[-1]))
            except OSError as e:
                self._directory = b"/".join(self._parts)
                if e.errno in _ABSENT:
                    return None
                raise self._error(directory, e) from e
            self._parts.append(part)
        self._directory = directory
        return self._fds[-1]

    def _error(self, name: bytes, e: OSError) -> BangerError:
        path = self._root / name.decode(errors="replace")
        return BangerError(
            "operation_failed",
            f"reading {format_name(name)} in {self._root}: {e.strerror}",
            hint=f"ls -ld {shlex.quote(str(path))}",
        )
