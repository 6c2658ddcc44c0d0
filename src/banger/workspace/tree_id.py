"""The git tree id of what is shipped, computed on the way: byte for byte, without conversions.

Equal to `git add --all --force && git write-tree` on the files in a repository without attributes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

from banger.workspace.index import EXECUTABLE, SYMLINK

_FILE = 0o100644


class TreeHasher:
    """Collects blobs and makes one id of them. One for each stream."""

    def __init__(self, object_format: str) -> None:
        self._new = hashlib.sha256 if object_format == "sha256" else hashlib.sha1
        self._directories: dict[bytes, list[tuple[bytes, bytes]]] = defaultdict(list)

    def begin_blob(self, size: int) -> Any:
        """A hash that wants the `size` bytes of a blob next."""
        return self._new(b"blob %d\0" % size, usedforsecurity=False)

    def add(
        self, name: bytes, digest: bytes, *, executable: bool = False, link: bool = False
    ) -> None:
        """One file, with the digest of its blob (of the target, for a symlink)."""
        mode = SYMLINK if link else EXECUTABLE if executable else _FILE
        directory, _, base = name.rpartition(b"/")
        self._directories[directory].append((base, b"%o %s\0%s" % (mode, base, digest)))

    def finish(self) -> str:
        """The id of the root tree."""
        for directory in list(self._directories):
            above = directory
            while above:  # those that hold only directories are missing so far
                above = above.rpartition(b"/")[0]
                self._directories.setdefault(above, [])
        # Deepest first: a directory is complete before it is entered in the one above.
        for directory in sorted(self._directories, key=_depth, reverse=True):
            if not directory:
                continue
            digest = self._digest(directory)
            parent, _, base = directory.rpartition(b"/")
            # git sorts a directory as if its name ended in a slash.
            self._directories[parent].append((base + b"/", b"40000 %s\0%s" % (base, digest)))
        return self._digest(b"").hex()

    def _digest(self, directory: bytes) -> bytes:
        content = b"".join(line for _, line in sorted(self._directories[directory]))
        return self._new(b"tree %d\0%s" % (len(content), content), usedforsecurity=False).digest()


def _depth(directory: bytes) -> int:
    return directory.count(b"/") + 1 if directory else 0
