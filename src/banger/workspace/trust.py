"""Whether a repository may have its history from where it says.

A repository is hostile input, and can name any path as the place of its history: `.git` may be a
file or a link, `commondir` and `objects/info/alternates` name directories, and anything in `.git`
may be a link. Believed, it would take another repository of the same user into a guest. Who owns
the files tells nothing (all of them are the user's, so git's own safe.directory is content).

What lies below the work tree is the repository's own. A git directory elsewhere counts when it
leads back: that of a linked worktree names its `.git`, that of a submodule its work tree. For
everything else the user's own configuration has the word (`banger.trustedRepository`), never the
repository's. Reads only; what somebody changes between this look and git's is not covered.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.workspace.git_files import find_start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.workspace.git import Git

KEY = "banger.trustedRepository"
_READ_BY_GIT = (
    "HEAD", "config", "config.worktree", "index", "info", "logs", "objects", "packed-refs", "refs",
    "reftable", "shallow",
)  # fmt: skip
PROTECTED_SCOPES = ("system", "global", "command")
"""Where the user speaks, and no repository: git-config(1), SCOPES."""
_MAX_BACK_LINK = 8192


def check_history(git: Git, root: Path, git_dir: Path, common_dir: Path) -> bool:
    """Refuse a history that another repository may be robbed of. All paths are resolved. The result
    tells whether something lies elsewhere and the user has allowed it.

    Raises:
        BangerError: bad_request, reason `foreign_history`.
    """
    owners = [root]
    foreign: Path | None = None
    hint = f"git config --global --add {KEY} {shlex.quote(str(root))}"
    linked = common_dir != git_dir and git_dir.parent == common_dir / "worktrees"
    if not git_dir.is_relative_to(root) and not _leads_back(git, root, git_dir, linked=linked):
        foreign = git_dir
        if linked:
            hint = f"git -C {shlex.quote(str(root))} worktree repair"
    elif common_dir != git_dir and not linked and not common_dir.is_relative_to(root):
        foreign = common_dir
    else:
        # What the main repository borrows is its own affair, now that it is known to be ours.
        owners += [common_dir, *([common_dir.parent] if common_dir.name == ".git" else [])]
        inside = (root, git_dir, common_dir)
        foreign = next(_find_outside(git, inside, (git_dir, common_dir)), None)
    if foreign is None:
        return False
    if _is_trusted(git, owners):
        return True
    raise BangerError(
        "bad_request",
        f"the repository {root} takes its history from {foreign}, and nothing there says that "
        "it may; go on only if that was set up by you",
        hint=hint,
        reason="foreign_history",
    )


def _leads_back(git: Git, root: Path, git_dir: Path, *, linked: bool) -> bool:
    """Whether a git directory names this work tree: git-worktree(1), DETAILS, `gitdir`;
    gitrepository-layout(5), `modules`, and core.worktree in git-config(1)."""
    if linked:
        named = find_start(git_dir / "gitdir", _MAX_BACK_LINK) or b""
        entry = git_dir / os.fsdecode(named.rstrip(b"\n"))
        return entry.name == ".git" and find_path(entry.parent) == root
    for scope in ("--local", "--worktree"):
        # A given file is read without what it includes.
        found = git.try_run("config", scope, "-z", "--get", "core.worktree")
        value = os.fsdecode(found.stdout.removesuffix(b"\0"))
        if found.returncode == 0 and value and find_path(git_dir / value) == root:
            return True
    return False


def _find_outside(
    git: Git, inside: tuple[Path, ...], directories: tuple[Path, Path]
) -> Iterator[Path]:
    """Where links in what git reads, or borrowed objects, lead out of what is known. `directories`
    are the git directory and the common one."""
    waiting = [d / name for d in dict.fromkeys(directories) for name in _READ_BY_GIT]
    if os.path.lexists(directories[-1] / "objects/info/alternates"):
        waiting += _list_lenders(git)
    seen = set()
    while waiting:
        path = waiting.pop()
        resolved = find_path(path)
        if resolved is None:
            continue
        if not any(resolved.is_relative_to(known) for known in inside):
            yield resolved
            continue
        if resolved in seen:
            continue
        seen.add(resolved)
        try:
            with os.scandir(resolved) as found:
                waiting += [
                    Path(e.path) for e in found if e.is_symlink() or e.is_dir(follow_symlinks=False)
                ]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            # git may open what is in it all the same, by name.
            raise BangerError(
                "operation_failed", f"inspecting the repository: reading {resolved}: {e.strerror}"
            ) from e


def _list_lenders(git: Git) -> list[Path]:
    """As git has read them: quoted, relative, and those of the lenders."""
    listed = git.run("count-objects", "-v", doing="finding borrowed objects")
    words = b"alternate: "
    names = [x.removeprefix(words) for x in listed.splitlines() if x.startswith(words)]
    return [Path(os.fsdecode(_unquote(name))) for name in names]


def _unquote(name: bytes) -> bytes:
    """A name as git prints it, in quotes with C escapes where it is odd (quote.c)."""
    if not name.startswith(b'"'):
        return name
    text = name[1:-1].decode("latin-1")
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


def _is_trusted(git: Git, owners: list[Path]) -> bool:
    found = git.try_run("config", "--show-scope", "-z", "--get-all", KEY)
    words = os.fsdecode(found.stdout).split("\0")[:-1]
    for scope, value in zip(words[::2], words[1::2], strict=True):
        if scope not in PROTECTED_SCOPES or not value:
            continue
        if value == "*" or any(_names(value, owner) for owner in owners):
            return True
    return False


def _names(value: str, owner: Path) -> bool:
    """As git reads safe.directory: a directory, or with `/*` at its end whatever is below it."""
    path = Path(value).expanduser()
    if path.name == "*":
        return find_path(path.parent) in owner.parents
    return find_path(path) == owner


def find_path(path: Path) -> Path | None:
    """Where a path leads; None for what nobody can open: a loop of links, a name with a NUL."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None
