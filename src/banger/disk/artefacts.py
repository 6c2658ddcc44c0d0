"""Built artefacts, kept by the hash of their inputs: `<build cache>/<kind>/<name>/<key>/`.

A directory appears whole by one rename and holds an index with the identity of each file. One key
is kept per name, so the cache does not grow with every update. What a killed build left behind is
removed by the next one of that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.decoding import MALFORMED, decode_json
from banger.disk.identity import FileChanged, FileIdentity, check_identity, identify
from banger.faults import step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from banger.disk.background import Job

_INDEX = "index.json"
_STAGING = "build"


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
                    files.publish_directory(staging, target)
            for other in directory.iterdir():
                if other != target and not other.name.startswith("."):
                    files.remove_tree(other)
        yield target


def find_artefacts(directory: Path, key: str) -> Path | None:
    """The directory of the artefacts for `key` where they are there and intact, else None."""
    target = directory / key
    return target if _is_intact(target) else None


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove staging directories of this prefix. The caller holds the lock that their makers held.

    Two staging directories with one prefix exist only when a process was killed over one.
    """
    pattern = re.compile(rf"\.{re.escape(prefix)}-[0-9a-f]{{8}}")
    for path in parent.iterdir():
        if pattern.fullmatch(path.name):
            files.remove_tree(path)


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
        index = decode_json((target / _INDEX).read_bytes(), type=_Index)
        for name, identity in index.files.items():
            check_identity(target / name, identity, hash_always=True)
    except (OSError, FileChanged, *MALFORMED):
        return False
    return True
