"""Blobs by digest: `<cache>/oci/blobs/sha256/<hex>`, shared by all pulls.

A blob appears whole, by a rename, after its size and digest were checked; what is on the way lies
beside, in `<cache>/oci/fetch/`. Two pulls that want one blob fetch it once. A blob in use is held
open under a shared lock, which the kernel takes back from whoever dies: `eviction` removes no blob
that is locked. Its time of modification is that of its last use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from banger.oci.work import Work

PART = ".part"
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
        _share(fd)
        st = os.fstat(fd)
        if st.st_size != size or not st.st_nlink:  # damaged, or evicted before it was locked
            os.close(fd)
            if st.st_nlink:
                path.unlink(missing_ok=True)
            return False
        _mark_used(fd)
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
        with self._work.locked(lock_of(self._fetching, name)):
            if self.find(digest, size):
                return True
            part = self._fetching / f"{name}{PART}"  # what a killed pull left is overwritten
            try:
                with part.open("w+b") as f:
                    fetch(f)
                    f.flush()
                    fd = os.open(f"/proc/self/fd/{f.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
                self._held[digest] = fd
                # Before it can be seen: nobody evicts it in between.
                _share(fd)
                _mark_used(fd)
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


def lock_of(fetching: Path, name: str) -> Path:
    """The lock of whoever fetches the blob of this name.

    There are 256 for all blobs. They are never removed, since somebody may be waiting for one.
    """
    return fetching / f"{name[:2]}.lock"


def _share(fd: int) -> None:
    """Lock a blob against eviction, until its descriptor is closed."""
    fcntl.flock(fd, fcntl.LOCK_SH)  # an eviction holds its lock for a moment only


def _mark_used(fd: int) -> None:
    # Not the kernel's own "now", which stands still for milliseconds.
    now = time.time_ns()
    os.utime(fd, ns=(now, now))
