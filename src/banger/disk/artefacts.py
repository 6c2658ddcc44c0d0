"""Built artefacts, kept by the hash of their inputs: `<build cache>/<kind>/<name>/<key>/`.

A directory appears whole by one rename and holds an index with the identity of each file. One key
is kept per name, so the cache does not grow with every update. What a killed build left behind is
removed by the next one of that name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.disk.identity import FileChanged, FileIdentity, check_identity, identify
from banger.faults import step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from banger.disk.background import Job

_INDEX = "index.json"
_STAGING = "build"
_STAGING_NAME = re.compile(r"\.([a-z]+)-(.+)-[0-9a-f]{8}")
REPLACED = "replaced-"
"""What lies in a staging directory because something else takes its place: this and its name."""


class _Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    files: dict[str, FileIdentity]


def inputs_key(parts: Iterable[bytes | str]) -> str:
    """32 hex digits that stand for these inputs; the parts' borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def built_artefacts(
    directory: Path,
    key: str,
    build: Callable[[Path], None],
    *,
    job: Job,
    refresh: bool = False,
) -> Iterator[Path]:
    """The directory of the artefacts for `key`, built by `build(staging)` unless intact there.

    Locked against other builds of the same name until the block is left, so that the caller can
    link files out of it. A peer that built it meanwhile is a success. `refresh` builds anew.

    Raises:
        JobCancelled: while waiting for the lock. Whatever `build` raises; nothing is then left.
    """
    target = directory / key
    with job.locked(directory / ".lock"):
        remove_abandoned(directory, _STAGING)
        if refresh or not _is_intact(target):
            with files.staging_directory(directory, _STAGING) as staging:
                with step("artefact.build"):
                    build(staging)
                job.check()
                with step("artefact.seal"):
                    _seal(staging)
                with step("artefact.publish"):
                    files.remove_tree(target)
                    staging.rename(target)
                    files.sync_directory(directory)
            for other in directory.iterdir():
                if other != target and not other.name.startswith("."):
                    files.remove_tree(other)
        yield target


def find_artefacts(directory: Path, key: str) -> Path | None:
    """The directory of the artefacts for `key` where they are there and intact, else None."""
    target = directory / key
    return target if _is_intact(target) else None


def remove_abandoned(
    parent: Path, prefix: str, *, is_missing: Callable[[Path], bool] | None = None
) -> None:
    """Remove staging directories of this prefix. The caller holds the lock that their makers held.

    Two staging directories with one prefix exist only when a process was killed over one. What it
    had taken out of `parent` to put something else in its place (`REPLACED` and its name) comes
    back first, where there is nothing: `is_missing` looks at where it was.
    """
    pattern = re.compile(rf"\.{re.escape(prefix)}-[0-9a-f]{{8}}")
    for path in parent.iterdir():
        if pattern.fullmatch(path.name):
            for replaced in path.glob(f"{REPLACED}*"):
                target = parent / replaced.name.removeprefix(REPLACED)
                if not target.exists() and (is_missing is None or is_missing(target)):
                    replaced.rename(target)
            files.remove_tree(path)


def recover(
    parent: Path, *, is_missing: Callable[[str, Path], bool] | None = None
) -> tuple[Path, ...]:
    """Remove every staging directory below `parent` whose maker was killed; return them.

    Entries of one name have one lock there, `.NAME.lock`; whose lock is held is left alone.
    """
    done = []
    for path in sorted(parent.glob(".*-*")):
        found = _STAGING_NAME.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        kind, name = found.groups()
        with _if_free(parent / f".{name}.lock") as free:
            if free and files.is_abandoned(path):

                def missing(target: Path, name: str = name) -> bool:
                    return is_missing is None or is_missing(name, target)

                remove_abandoned(parent, f"{kind}-{name}", is_missing=missing)
                done.append(path)
    return tuple(done)


@contextlib.contextmanager
def _if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file if nobody else does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _seal(staging: Path) -> None:
    index = {}
    for path in sorted(staging.iterdir()):
        path.chmod(0o444)
        index[path.name] = identify(path)
    files.write_atomic(
        staging / _INDEX, msgspec.json.encode(_Index(files=index), order="sorted"), mode=0o444
    )


def _is_intact(target: Path) -> bool:
    """All files hash to what was built. A store that shares their inodes may have been damaged."""
    try:
        index = msgspec.json.decode((target / _INDEX).read_bytes(), type=_Index)
        for name, identity in index.files.items():
            check_identity(target / name, identity, hash_always=True)
    except (OSError, msgspec.DecodeError, FileChanged):
        return False
    return True
