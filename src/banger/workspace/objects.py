"""Reads objects through one `git cat-file --batch` that lives as long as the reader.

`cat-file` converts nothing: no smudge filter, no line ends, no textconv.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Self

from banger.errors import BangerError
from banger.workspace.git import Git, end

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_MAX_COMMIT_HEADER = 1 << 20
_CHUNK = 1 << 20


class ObjectReader:
    """One object at a time; a streamed one has to be read to its end before the next."""

    def __init__(self, git: Git) -> None:
        self._p = git.popen(
            "cat-file",
            "--batch",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._p.stdin is not None and self._p.stdout is not None
        self._in = self._p.stdin
        self._out = self._p.stdout
        self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        end(self._p)

    def find_commit(self, oid: str) -> tuple[str, ...] | None:
        """The parents of a commit as the object names them (no graft, no replacement, no shallow
        boundary); None when the object is not here."""
        found = self._ask(oid)
        if found is None:
            return None
        kind, _ = found
        head = self.read(_MAX_COMMIT_HEADER)
        while self.read(_CHUNK):
            pass
        if kind != "commit":
            raise BangerError("operation_failed", f"reading the history: {oid} is a {kind}")
        lines = head.partition(b"\n\n")[0].split(b"\n")
        return tuple(x[7:].decode() for x in lines if x.startswith(b"parent "))

    def open_blob(self, oid: str) -> tuple[int, Callable[[int], bytes]] | None:
        """Size and `read(at most)` of a blob; None when the object is not here."""
        found = self._ask(oid)
        if found is None:
            return None
        kind, size = found
        if kind != "blob":
            raise BangerError("operation_failed", f"reading a file's content: {oid} is a {kind}")
        return size, self.read

    def read(self, most: int) -> bytes:
        """The next bytes of the open object, as many as asked for unless it ends before."""
        if self._left == 0:
            return b""
        data = self._out.read(min(most, self._left))
        if not data:
            raise BangerError("operation_failed", "reading the repository's objects: git ended")
        self._left -= len(data)
        if self._left == 0:
            self._out.read(1)  # the newline after the content
        return data

    def _ask(self, oid: str) -> tuple[str, int] | None:
        assert self._left == 0
        try:
            self._in.write(oid.encode() + b"\n")
            self._in.flush()
        except BrokenPipeError as e:
            raise BangerError(
                "operation_failed", "reading the repository's objects: git ended"
            ) from e
        words = self._out.readline().decode().split()
        if len(words) == 2 and words[1] == "missing":
            return None
        if len(words) != 3:
            raise BangerError(
                "operation_failed",
                f"reading the object {oid}: {' '.join(words) or 'git ended'}",
                hint="git fsck",
            )
        self._left = int(words[2])
        if self._left == 0:
            self._out.read(1)
        return words[1], int(words[2])
