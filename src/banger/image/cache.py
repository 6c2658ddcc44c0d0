"""The cache of container images' layers and documents, and giving its room back.

Nothing in it is needed by a stored image. A pull that runs while it is pruned holds the files that
it reads open, and fetches again what it finds missing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from banger import files
from banger.api.results import PrunedCache
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.progress import Silent

if TYPE_CHECKING:
    from banger.config.paths import Paths

_PRUNED = "pruned"


async def prune_cache(paths: Paths, *, dry_run: bool) -> PrunedCache:
    """Remove every cached blob, or only count them."""
    return await run_job(lambda job: _prune(paths, job, dry_run=dry_run), Silent())


def _prune(paths: Paths, job: Job, *, dry_run: bool) -> PrunedCache:
    blobs = paths.oci_blobs
    root = blobs.parent
    with job.locked(root / ".prune.lock"):
        if not dry_run:
            remove_abandoned(root, _PRUNED)
        count = size = 0
        try:
            with os.scandir(blobs) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        count += 1
                        size += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            return PrunedCache(blobs=0, bytes=0, directory=str(blobs), dry_run=dry_run)
        if not dry_run:
            # Out of sight by one rename: a pull sees all of the cache or none of it.
            with files.staging_directory(root, _PRUNED) as aside:
                blobs.rename(aside / "blobs")
    return PrunedCache(blobs=count, bytes=size, directory=str(blobs), dry_run=dry_run)
