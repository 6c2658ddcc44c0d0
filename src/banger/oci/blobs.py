"""Blobs by digest: `<cache>/oci/blobs/sha256/<hex>`, shared by all pulls.

A blob appears whole, by a rename, after its size and digest were checked; what is on the way lies
beside, in `<cache>/oci/fetch/`. Two pulls that want one blob fetch it once. A blob in use is held
open, so that pruning the cache under it does no harm.
"""

from __future__ import annotations

import hashlib
import os
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from banger.oci.work import Work

_READ = 1 << 20


class BlobStore:
    """The cache, for one pull: closing it lets go of the blobs that it gave out."""

    def __init__(self, directory: Path, work: Work) -> None:
        """`directory` is `…/blobs/sha256`."""
        self._directory = directory
        self._fetching = directory.parent.parent / "fetch"
        self._work = work
        self._held: dict[str, int] = {}

    def __enter__(self) -> BlobStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def find(self, digest: str, size: int) -> bool:
        """Whether the blob is here, in its size. It is then held, and `open` works."""
        if digest in self._held:
            return True
        path = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        if os.fstat(fd).st_size != size:
            os.close(fd)
            path.unlink(missing_ok=True)
            return False
        self._held[digest] = fd
        return True

    def ensure(self, digest: str, size: int, fetch: Callable[[IO[bytes]], None]) -> bool:
        """Have the blob; `fetch` writes it to a new file and checks it. True: it was here already.

        Raises:
            whatever `fetch` raises; nothing of the blob is then left.
        """
        if self.find(digest, size):
            return True
        name = digest.removeprefix("sha256:")
        # 256 locks for all blobs: they are never removed, since somebody may be waiting for one.
        with self._work.locked(self._fetching / f"{name[:2]}.lock"):
            if self.find(digest, size):
                return True
            part = self._fetching / f"{name}.part"  # what a killed pull left is overwritten
            try:
                with part.open("w+b") as f:
                    fetch(f)
                    f.flush()
                    self._held[digest] = os.open(
                        f"/proc/self/fd/{f.fileno()}", os.O_RDONLY | os.O_CLOEXEC
                    )
                self._directory.mkdir(parents=True, exist_ok=True)
                part.replace(self._path(digest))
            finally:
                part.unlink(missing_ok=True)
        return False

    def open(self, digest: str) -> IO[bytes]:
        """A held blob from its start; also when its name is gone."""
        # By a description of its own: a duplicate would share the position.
        fd = os.open(f"/proc/self/fd/{self._held[digest]}", os.O_RDONLY | os.O_CLOEXEC)
        return os.fdopen(fd, "rb")

    def read(self, digest: str) -> bytes:
        """A held document."""
        with self.open(digest) as f:
            return f.read()

    def drop_damaged(self) -> int:
        """Hash every held blob and remove those that are not what their name says."""
        damaged = 0
        for digest in list(self._held):
            hasher = hashlib.sha256()
            with self.open(digest) as f:
                while piece := f.read(_READ):
                    self._work.check()
                    hasher.update(piece)
            if f"sha256:{hasher.hexdigest()}" != digest:
                damaged += 1
                self._path(digest).unlink(missing_ok=True)
                os.close(self._held.pop(digest))
        return damaged

    def _path(self, digest: str) -> Path:
        return self._directory / digest.removeprefix("sha256:")
