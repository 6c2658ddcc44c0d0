"""The cache of container images: its limit, giving its room back, and the room that pulls use.

Nothing in it is needed by a stored image. What a running pull holds stays; everything else may go
at any time and is fetched again when it is wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from banger.api.results import PrunedCache
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import run_job
from banger.disk.space import existing_place, require_space
from banger.files import free_bytes
from banger.oci.eviction import evict
from banger.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.config.paths import Paths

ARCHIVE = "archive"
"""Prefix of the directories in which compressed archives are unpacked."""


async def prune_cache(paths: Paths, *, limit_bytes: int, dry_run: bool) -> PrunedCache:
    """Remove every blob that no pull uses now, or only count them."""
    return await run_job(lambda _: _prune(paths, limit_bytes, dry_run=dry_run), Silent())


def _prune(paths: Paths, limit_bytes: int, *, dry_run: bool) -> PrunedCache:
    if not dry_run:
        with using_scratch(paths):
            pass
    done = evict(paths.oci_blobs, keep_bytes=0, dry_run=dry_run)
    return PrunedCache(
        blobs=done.blobs,
        bytes=done.bytes,
        in_use_blobs=done.in_use_blobs,
        in_use_bytes=done.in_use_bytes,
        limit_bytes=limit_bytes,
        directory=str(paths.oci_blobs),
        dry_run=dry_run,
    )


def trim_cache(paths: Paths, *, keep_bytes: int) -> None:
    """Bring the cache down to its limit: the least recently used blobs go."""
    evict(paths.oci_blobs, keep_bytes=max(0, keep_bytes))


def require_room(
    paths: Paths, directory: Path, *, needed_bytes: int, reserve_bytes: int, doing: str
) -> None:
    """As `require_space`, but where the cache holds enough that nobody uses, that goes first.

    Raises:
        BangerError: operation_failed, reason disk_full.
    """
    place, blobs = existing_place(directory), existing_place(paths.oci_blobs)
    lacking = needed_bytes + reserve_bytes - free_bytes(place)
    if lacking > 0 and place.stat().st_dev == blobs.stat().st_dev:
        all_of_it = evict(paths.oci_blobs, keep_bytes=0, dry_run=True)
        if all_of_it.bytes >= lacking:
            total = all_of_it.bytes + all_of_it.kept_bytes
            evict(paths.oci_blobs, keep_bytes=max(0, total - lacking))
    require_space(directory, needed_bytes=needed_bytes, reserve_bytes=reserve_bytes, doing=doing)


@contextlib.contextmanager
def using_scratch(paths: Paths) -> Iterator[Path]:
    """The directory for what a pull unpacks, which others may use too.

    While anybody does, nobody takes what lies there for abandoned; else what a killed pull left is
    removed first.
    """
    scratch = paths.oci_blobs.parent
    scratch.mkdir(parents=True, exist_ok=True)
    fd = os.open(scratch / f".{ARCHIVE}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_abandoned(scratch, ARCHIVE)
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield scratch
    finally:
        os.close(fd)
