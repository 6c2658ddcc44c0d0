"""Which files are shipped: decided from git's listings, never by running git's conversions.

`select` is the plan that `list_shipped` prints and `pack` carries out. Whether a planned file is on
disk at all (a deletion is not shipped) is seen when it is looked at, so the plan costs no lstat.
"""

from __future__ import annotations

import shlex
import stat
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.workspace.index import (
    EXECUTABLE,
    GITLINK,
    SYMLINK,
    IndexEntry,
    list_untracked,
    read_index,
)
from banger.workspace.names import format_name, format_names
from banger.workspace.options import DIRECTORY, Candidate, Selection
from banger.workspace.repository import Repository, check_mode, resolve_target
from banger.workspace.scratch import Scratch, open_scratch
from banger.workspace.worktree import WorkTree

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from banger.workspace.options import ShipOptions


def list_shipped(
    repository: Repository, options: ShipOptions, *, scratch_parent: Path | None = None
) -> list[bytes]:
    """The names of the files that `pack` would ship, relative to the root, sorted.

    Raises:
        BangerError: as `pack` would, before it wrote anything.
    """
    with open_scratch(repository, scratch_parent) as scratch:
        selection = select(scratch, options)
    names = []
    with WorkTree(repository.root) as tree:
        for name, mode, oid in selection.candidates:
            if mode == DIRECTORY:
                continue
            if oid is None:
                found = tree.find(name)
                if found is None or not is_shippable(found.st_mode):
                    continue
            names.append(name)
    return sorted(names)


def format_shipped(names: Iterable[bytes]) -> str:
    """What `--dry-run` prints: one line a file, odd names in git's C quoting."""
    return "".join(f"{format_name(n)}\n" for n in names)


def is_shippable(mode: int) -> bool:
    """Whether a file of this `st_mode` has content that can be copied."""
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def select(scratch: Scratch, options: ShipOptions) -> Selection:
    """Decide what is shipped.

    Raises:
        BangerError: bad_request when mode, branch or REF do not go with this repository, or when
            uncommitted changes do not apply to REF.
    """
    repository = scratch.repository
    check_mode(repository, options)
    target = resolve_target(repository, options)
    if options.mode == "full_copy":
        return _select_everything(repository, target)
    entries = {e.name: e for e in read_index(repository.git())}
    untracked, left_out = _list_untracked(repository, options)
    if options.mode == "shallow_overlay" and target == repository.head_commit:
        chosen = {e.name: Candidate(e.name, e.mode, None) for e in entries.values()}
        flagged = [e for e in entries.values() if e.skip_worktree or e.assume_unchanged]
        tracked = scratch.read_tree(target).keys() if flagged and target else set[bytes]()
    else:
        assert target is not None
        wanted = scratch.read_tree(target)
        _check_no_gitlinks(repository, options, wanted)
        chosen = _select_from_tree(scratch, options, target, wanted, entries, untracked)
        flagged = [e for e in entries.values() if e.skip_worktree or e.assume_unchanged]
        tracked = wanted.keys()
    chosen.update((name, Candidate(name, 0, None)) for name in untracked)
    return Selection(
        target=target,
        candidates=tuple(chosen.values()),
        skip_worktree=tuple(e.name for e in flagged if e.skip_worktree and e.name in tracked),
        assume_unchanged=tuple(e.name for e in flagged if e.assume_unchanged and e.name in tracked),
        left_out=tuple(left_out),
    )


def _list_untracked(repository: Repository, options: ShipOptions) -> tuple[set[bytes], list[bytes]]:
    """The untracked files to ship, and the repositories among them, which are not."""
    if not options.include_untracked or options.mode != "shallow_overlay":
        return set(), []
    names = list_untracked(repository.git())
    repositories = [n for n in names if n.endswith(b"/")]
    return set(names).difference(repositories), repositories


def _select_from_tree(
    scratch: Scratch,
    options: ShipOptions,
    target: str,
    wanted: dict[bytes, tuple[int, str]],
    entries: dict[bytes, IndexEntry],
    untracked: set[bytes],
) -> dict[bytes, Candidate]:
    """The files of a commit; the user's changes over them unless only metadata is asked for.

    A file that is the same in HEAD and unchanged on disk is taken from disk: there a filter (LFS)
    has already given it its content. The others are the blobs as they are.
    """
    head = scratch.repository.head_commit
    if head is None:  # every file in the index is a change
        current, changed = dict[bytes, tuple[int, str]](), set(entries)
    else:
        current = wanted if head == target else scratch.read_tree(head)
        changed = scratch.list_changed(head)
    overlay = options.mode == "shallow_overlay"
    if overlay:
        _check_changes_apply(scratch.repository, options, changed | untracked, current, wanted)
    chosen = {}
    for name, (mode, oid) in wanted.items():
        if overlay and name in changed:
            continue
        if name in entries and entries[name].skip_worktree:
            # Not a deletion: the user does not want it in the work tree, and the copy says so too.
            continue
        unchanged = name not in changed and current.get(name) == (mode, oid)
        chosen[name] = Candidate(name, mode, None if unchanged else oid)
    if overlay:
        # What was taken out of the index is deleted, even if a file of that name is left.
        for name in changed & entries.keys():
            chosen[name] = Candidate(name, entries[name].mode, None)
    return chosen


def _check_changes_apply(
    repository: Repository,
    options: ShipOptions,
    changed: set[bytes],
    current: dict[bytes, tuple[int, str]],
    wanted: dict[bytes, tuple[int, str]],
) -> None:
    """A change applies when what it changes is the same in HEAD and in REF: the rule of
    `git checkout REF`. Nor may it stand where REF has a directory, or below a file of REF."""
    directories = {d for name in wanted.keys() - changed for d in _parents(name)}
    clashing = [
        name
        for name in sorted(changed)
        if current.get(name) != wanted.get(name)
        or (name not in current and name in directories)
        or (name not in current and any(d in wanted and d not in changed for d in _parents(name)))
    ]
    if clashing:
        here = shlex.quote(str(repository.root))
        raise BangerError(
            "bad_request",
            f"the uncommitted changes of {repository.root} do not apply to {options.from_ref}: "
            f"{format_names(clashing)}",
            hint=f"git -C {here} stash, or --mode metadata_only",
            reason="changes_do_not_apply",
        )


def _parents(name: bytes) -> Iterable[bytes]:
    while b"/" in name:
        name = name.rpartition(b"/")[0]
        yield name


def _check_no_gitlinks(
    repository: Repository, options: ShipOptions, wanted: dict[bytes, tuple[int, str]]
) -> None:
    links = [name for name, (mode, _) in wanted.items() if mode == GITLINK]
    if links:
        raise BangerError(
            "bad_request",
            f"{options.from_ref or 'HEAD'} of {repository.root} has submodules "
            f"({format_names(links)}), which the workspace mode {options.mode} does not ship",
            hint="check it out and use --mode full_copy",
            reason="submodules",
        )


def _select_everything(repository: Repository, target: str | None) -> Selection:
    modes = {e.name: e.mode for e in read_index(repository.git())}
    chosen, nested, left_out = [], [], []
    with WorkTree(repository.root) as tree:
        for name, kind in tree.walk():
            directory, _, base = name.rpartition(b"/")
            if base.lower() == b".git":
                if directory:
                    nested.append(directory)
            elif kind == stat.S_IFDIR:
                chosen.append(Candidate(name, DIRECTORY, None))
            elif is_shippable(kind):
                mode = modes.get(name, 0)
                chosen.append(Candidate(name, 0 if mode == GITLINK else mode, None))
            else:
                left_out.append(name)
    return Selection(
        target=target,
        candidates=tuple(chosen),
        nested=tuple(nested),
        left_out=tuple(left_out),
    )


def tar_mode(candidate_mode: int, st_mode: int, *, trust_disk: bool) -> int:
    """0755 or 0644: the owner's x bit, as git reads it; with core.fileMode=false and for blobs
    what git has recorded."""
    if trust_disk or candidate_mode in (0, SYMLINK):
        return 0o755 if st_mode & stat.S_IXUSR else 0o644
    return 0o755 if candidate_mode == EXECUTABLE else 0o644
