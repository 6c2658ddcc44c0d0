"""What a killed daemon had under way: staging directories of images, kernels, caches, workspaces.

Each is locked by its maker while that lives, so that the ones of other processes are left alone. An
image or a kernel that was just being replaced is put back.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.files import is_abandoned, remove_tree
from banger.image.entries import recover_images
from banger.kernel.entries import recover_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from banger.config.paths import Paths

log = logging.getLogger(__name__)

_STAGING = re.compile(r"\.[a-z-]+-[0-9a-f]{8}")


def remove_abandoned(paths: Paths) -> None:
    """Give it back. What cannot be removed is logged, and shown by `banger doctor`."""
    steps: tuple[Callable[[Paths], tuple[Path, ...]], ...] = (
        recover_images,
        recover_kernels,
        _recover_others,
    )
    for recover in steps:
        try:
            for path in recover(paths):
                log.warning("%s was left by an operation that was killed: removed", path)
        except (BangerError, OSError) as e:
            log.warning("removing what killed operations left: %s", e)


def _recover_others(paths: Paths) -> tuple[Path, ...]:
    places = [
        paths.cache / "scratch",
        paths.oci_blobs.parent,
        paths.state,
        *paths.build_cache.glob("*/*"),
        *(place for place in paths.images.glob("*") if place.is_dir()),
    ]
    return tuple(path for place in places for path in _removed(place))


def _removed(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.glob(".*-*")):
        if _STAGING.fullmatch(path.name) and path.is_dir() and is_abandoned(path):
            remove_tree(path)
            yield path
