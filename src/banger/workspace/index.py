"""The index of the user's repository, listed by git and read here: names, modes, flags."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from banger.workspace.git import failure
from banger.workspace.names import check_name

if TYPE_CHECKING:
    from banger.workspace.git import Git

# A component of a name, in the output of `ls-files -s -z`, that `check_name` will refuse.
_SUSPECT = re.compile(rb"[\t/](?:\.{0,2}|\.git)[/\0]", re.IGNORECASE)
GITLINK = 0o160000
SYMLINK = 0o120000
REGULAR = 0o100644
EXECUTABLE = 0o100755


class IndexEntry(NamedTuple):
    """One stage of one path. `mode` is git's; flags as in git-update-index(1)."""

    name: bytes
    mode: int
    oid: str
    stage: int
    skip_worktree: bool
    assume_unchanged: bool


def read_index(git: Git) -> list[IndexEntry]:
    """Every entry, in the index's order (by name, then stage).

    Raises:
        BangerError: git cannot read the index, or it holds a name that no checkout can have.
    """
    out = git.run("ls-files", "-z", "-s", "-v", doing="reading the index")
    entries = []
    for record in out.split(b"\0")[:-1]:
        meta, _, name = record.partition(b"\t")
        tag, mode, oid, stage = meta.split(b" ")
        entries.append(
            IndexEntry(
                name=check_name(name),
                mode=int(mode, 8),
                oid=oid.decode(),
                stage=int(stage),
                skip_worktree=tag in b"Ss",
                assume_unchanged=tag.islower(),
            )
        )
    return entries


def list_submodules(git: Git) -> list[bytes]:
    """The names of the index that are submodules. Raises as `read_index`."""
    out = git.run("ls-files", "-z", "-s", doing="reading the index")
    # Nearly always neither is there; then the list, which may be long, need not be taken apart.
    if b"160000 " not in out and not _SUSPECT.search(out):
        return []
    records = (record.partition(b"\t") for record in out.split(b"\0")[:-1])
    return [name for meta, _, name in records if check_name(name) and meta.startswith(b"160000 ")]


_FORBIDDEN = re.compile(rb"^warning: .*: Permission denied$", re.M)


def list_untracked(git: Git) -> list[bytes]:
    """Untracked files that are not ignored. A repository inside the repository comes back as one
    name that ends in `/`.

    Raises:
        BangerError: git may not look into a directory, or read a `.gitignore`: what it leaves out
            then, or does not, is not what was asked for.
    """
    doing = "listing untracked files"
    done = git.try_run("ls-files", "-z", "--others", "--exclude-standard")
    if done.returncode != 0 or _FORBIDDEN.search(done.stderr):
        raise failure(doing, done.stderr, done.returncode)
    names = done.stdout.split(b"\0")[:-1]
    for name in names:
        check_name(name.removesuffix(b"/"))
    return names
