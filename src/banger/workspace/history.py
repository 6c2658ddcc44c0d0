"""How much history goes along: the commits that a clone of depth 10 would have.

Found level by level from the tips, so the time follows the window and not the length of the
history.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from banger.workspace.objects import ObjectReader

DEPTH = 10
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def find_boundary(
    reader: ObjectReader, tips: Iterable[str], already: frozenset[str], *, depth: int = DEPTH
) -> tuple[str, ...]:
    """The commits whose parents stay behind: what `shallow` of the copy holds, sorted.

    A commit is `depth` steps from a tip (a tip itself is 1), on the shortest way. `already` is
    where the history of the source ends.

    Raises:
        BangerError: a commit of the window is missing from the repository.
    """
    level = list(dict.fromkeys(tips))
    seen = set(level)
    boundary = set()
    for step in range(1, depth + 1):
        following = []
        for oid in level:
            parents = reader.find_commit(oid)
            if parents is None:
                raise BangerError(
                    "operation_failed",
                    f"reading the history: the commit {oid} is missing from the repository",
                    hint="git fsck",
                )
            if not parents:
                continue
            if oid in already or step == depth:
                boundary.add(oid)
                continue
            for parent in parents:
                if parent not in seen:
                    seen.add(parent)
                    following.append(parent)
        level = following
    return tuple(sorted(boundary))


def read_shallow(common_dir: Path) -> frozenset[str]:
    """Where the history of this repository ends (`shallow`, gitrepository-layout(5))."""
    path = common_dir / "shallow"
    try:
        words = frozenset(path.read_text("ascii").split())
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as e:
        raise BangerError("operation_failed", f"reading {path}: {e}") from e
    # A link to some other file must not travel on as this one.
    if not all(_OID.fullmatch(word) for word in words):
        raise BangerError("operation_failed", f"reading {path}: it holds more than commits")
    return words
