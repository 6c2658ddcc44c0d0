"""The version files that a guest's copy of a repository will have, read on the host.

Exactly those that are shipped count: an untracked `.mise.toml` that stays here is nothing to a
guest. Files are opened below the root through no link, and only their beginning is read.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from banger.workspace.files import select
from banger.workspace.repository import resolve_target
from banger.workspace.scratch import open_scratch
from banger.workspace.tooling import TOOL_FILES
from banger.workspace.worktree import WorkTree

if TYPE_CHECKING:
    from pathlib import Path

    from banger.workspace.options import ShipOptions
    from banger.workspace.repository import Repository

_MOST_BYTES = 1 << 20


def read_tool_files(
    repository: Repository, options: ShipOptions, *, scratch_parent: Path | None = None
) -> dict[str, bytes]:
    """The version files at the root of what is shipped, by name.

    Raises:
        BangerError: as `list_shipped`.
    """
    if options.mode == "full_copy":
        return _read_from_disk(repository, TOOL_FILES)
    unchanged = resolve_target(repository, options) == repository.head_commit
    if options.mode == "shallow_overlay" and unchanged:
        # Without a listing of everything, which takes long in a large repository.
        return _read_from_disk(repository, _list_here(repository, options))
    found: dict[str, bytes] = {}
    with open_scratch(repository, scratch_parent) as scratch:
        wanted = {c.name: c.oid for c in select(scratch, options).candidates}
        here = [name for name in TOOL_FILES if wanted.get(name.encode(), "") is None]
        found.update(_read_from_disk(repository, here))
        for name in TOOL_FILES:
            if oid := wanted.get(name.encode()):
                blob = scratch.git.run("cat-file", "blob", oid, doing=f"reading {name}")
                found[name] = blob[:_MOST_BYTES]
    return found


def _list_here(repository: Repository, options: ShipOptions) -> list[str]:
    """Which of the version files are tracked, or untracked and wanted."""
    asked = [["--cached"]]
    if options.include_untracked:
        asked.append(["--others", "--exclude-standard"])
    git = repository.git()
    listed: set[bytes] = set()
    for which in asked:
        out = git.run("ls-files", "-z", *which, "--", *TOOL_FILES, doing="listing version files")
        listed.update(out.split(b"\0"))
    return [name for name in TOOL_FILES if name.encode() in listed]


def _read_from_disk(repository: Repository, names: list[str] | tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    with WorkTree(repository.root) as tree:
        for name in names:
            seen = tree.find(name.encode())
            if seen is None or not stat.S_ISREG(seen.st_mode):
                continue
            fd = tree.open(name.encode())
            if fd is None:
                continue
            with os.fdopen(fd, "rb") as f:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    found[name] = f.read(_MOST_BYTES)
    return found
