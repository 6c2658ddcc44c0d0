"""What a killed daemon left half-written in state and cache, removed by the next one.

Everything that banger writes there takes its name when it is whole (`banger.files`); until then it
has a name that says so. Only the daemon writes to the state while it holds its lock, but for the
owner's keys and fetched programs, which have locks of their own. Several daemons may share the
cache: of it, staging directories alone are looked at, which their makers hold locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from typing import TYPE_CHECKING

from banger.files import remove_leftovers
from banger.image.entries import delete_image, find_shadowed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.config.paths import Paths

log = logging.getLogger(__name__)


def sweep_leftovers(paths: Paths) -> None:
    """Remove them; failures are logged, since nothing depends on it."""
    entries = (*_directories(paths.images), *_directories(paths.kernels))
    vms = _directories(paths.vms)
    plain = (paths.images, paths.kernels, paths.templates, *entries, *vms)
    below = [directory for vm in vms for directory in _directories(vm)]
    for directory in (*plain, *below):
        _sweep(directory)
    scratch = (paths.cache / "scratch", paths.oci_blobs.parent)
    builds = [build for kind in _directories(paths.build_cache) for build in _directories(kind)]
    for directory in (*scratch, *builds):
        _sweep(directory, plain=False)
    for directory, lock in (
        (paths.state, paths.state / ".bin.lock"),
        (paths.ssh, paths.ssh / ".lock"),
    ):
        with _unless_locked(lock) as free:
            if free:
                _sweep(directory)


def remove_shadowed(paths: Paths, used: set[str]) -> None:
    """Remove images that were being replaced when a daemon was killed; `used` ids stay."""
    for image in find_shadowed(paths):
        if image.id not in used:
            log.warning("image %s (%s) was being replaced and is removed", image.name, image.id)
            delete_image(paths, image.id)


def _sweep(directory: Path, *, plain: bool = True) -> None:
    try:
        for name in remove_leftovers(directory, plain=plain):
            log.warning("%s was not finished and is removed", directory / name)
    except OSError as e:
        log.warning("clearing up %s: %s", directory, e)


def _directories(directory: Path) -> list[Path]:
    try:
        return sorted(p for p in directory.iterdir() if p.is_dir() and not p.is_symlink())
    except OSError:
        return []


@contextlib.contextmanager
def _unless_locked(path: Path) -> Iterator[bool]:
    """Hold a lock for the block; False where somebody else has it, who is then at work there."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
