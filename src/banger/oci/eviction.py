"""The size of the blob cache: the least recently used blobs go, never one that a pull holds.

Knows nothing but the files: a blob's time of modification is its last use, its lock says that it is
in use. So there is no index that a crash could leave wrong. Evictions come one after the other: the
lock with which one looks at a blob would be a use of it to the next, which then took another.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.oci.blobs import PART, lock_of

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[0-9a-f]{64}")


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """What an eviction removed, or would remove, and what it leaves."""

    blobs: int = 0
    bytes: int = 0
    kept_blobs: int = 0
    kept_bytes: int = 0
    in_use_blobs: int = 0
    """Of those kept, the ones that had to stay although they should have gone."""
    in_use_bytes: int = 0


def evict(directory: Path, *, keep_bytes: int, dry_run: bool = False) -> Eviction:
    """Remove blobs from `…/blobs/sha256`, least recently used first, until `keep_bytes` are left.

    What pulls hold stays, so that more may be left. Transfers that a killed pull left go too.
    """
    if not directory.parent.is_dir():
        return Eviction()
    with files.locked(directory.parent / ".evict.lock"):
        if not dry_run:
            _remove_abandoned_parts(directory.parent.parent / "fetch")
        return _evict(directory, keep_bytes, dry_run=dry_run)


def _evict(directory: Path, keep_bytes: int, *, dry_run: bool) -> Eviction:
    rows = _list(directory)
    kept_blobs, kept_bytes = len(rows), sum(size for _, size, _ in rows)
    blobs = freed = in_use_blobs = in_use_bytes = 0
    for _, size, name in rows:
        if kept_bytes <= keep_bytes and keep_bytes:  # with 0 also the empty ones go
            break
        outcome = _remove(directory / name, dry_run=dry_run)
        if outcome is None:
            in_use_blobs, in_use_bytes = in_use_blobs + 1, in_use_bytes + size
            continue
        kept_blobs, kept_bytes = kept_blobs - 1, kept_bytes - size
        if outcome:
            blobs, freed = blobs + 1, freed + size
    return Eviction(
        blobs=blobs,
        bytes=freed,
        kept_blobs=kept_blobs,
        kept_bytes=kept_bytes,
        in_use_blobs=in_use_blobs,
        in_use_bytes=in_use_bytes,
    )


def _list(directory: Path) -> list[tuple[int, int, str]]:
    """Last use, size and name of each blob, the oldest use first."""
    # A clock that was set back must not make blobs that are never old.
    now = time.time_ns()
    rows = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    try:
                        st = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # evicted by somebody else meanwhile
                    rows.append((min(st.st_mtime_ns, now), st.st_size, entry.name))
    except FileNotFoundError:
        return []
    return sorted(rows)


def _remove(path: Path, *, dry_run: bool) -> bool | None:
    """Remove a blob; False when it is gone already, None when it is in use."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not _lock(fd):
            return None
        if not os.fstat(fd).st_nlink:
            return False  # and its name may be another file's by now
        if not dry_run:
            path.unlink()
        return True
    finally:
        os.close(fd)


def _remove_abandoned_parts(fetching: Path) -> None:
    """Remove what is not whole, unless somebody is fetching it."""
    for part in fetching.glob(f"*{PART}"):
        fd = os.open(lock_of(fetching, part.name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock(fd):
                part.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _lock(fd: int) -> bool:
    """Take the exclusive lock if nobody has any."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
