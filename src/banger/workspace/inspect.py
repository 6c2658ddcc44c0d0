"""What PATH is: the repository around it, or the exact reason why it cannot be shipped.

Reads only, starts nothing of the repository, changes nothing in it. The result is a snapshot: later
steps use the commit that was found here even when the user commits meanwhile.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.workspace.files import select
from banger.workspace.git import Git, failure, source_git
from banger.workspace.index import list_submodules
from banger.workspace.names import format_name, sanitise_name, strip_credentials
from banger.workspace.repository import Repository, check_branch, check_mode, resolve_target
from banger.workspace.scratch import open_scratch
from banger.workspace.trust import PROTECTED_SCOPES, check_history, find_path

if TYPE_CHECKING:
    from banger.workspace.options import ShipOptions

__all__ = ["Repository", "inspect_repository", "precheck"]

_COPIED_CORE = {
    "core.autocrlf": ("true", "false", "input"),
    "core.eol": ("lf", "crlf", "native"),
    "core.symlinks": ("true", "false"),
    "core.filemode": ("true", "false"),
    "core.sparsecheckout": ("true", "false"),
    "core.sparsecheckoutcone": ("true", "false"),
}
"""The settings that decide how a file compares with its blob; nothing else is taken over."""


def inspect_repository(path: Path) -> Repository:
    """The repository that encloses `path`.

    Raises:
        BangerError: not_found when `path` is missing; bad_request when it is no directory, not in a
            repository, in a bare one, inside a git directory, or in one whose work tree is
            elsewhere, or whose history is (reason `foreign_history`); operation_failed, reason
            `safe_directory`, when git refuses its owner.
    """
    start = _get_directory(path)
    git = source_git(start)
    facts = git.try_run(
        "rev-parse",
        "--is-bare-repository",
        "--is-inside-git-dir",
        "--is-inside-work-tree",
        "--show-object-format",
    )
    if facts.returncode != 0:
        raise _refusal(start, facts.stderr, facts.returncode)
    bare, in_git_dir, in_work_tree, object_format = facts.stdout.decode().split()
    if bare == "true":
        raise BangerError(
            "bad_request",
            f"{start} is a bare repository: it has no files to ship",
            hint=f"git clone {shlex.quote(str(start))} work && banger vm run ./work",
        )
    if in_git_dir == "true" or in_work_tree != "true":
        raise BangerError(
            "bad_request",
            f"{start} is inside a git directory, not in its work tree",
            hint="give the directory that holds your files",
        )
    root = _path_of(git, "--show-toplevel")
    git_dir = _path_of(git, "--absolute-git-dir")
    common_dir = _path_of(git, "--path-format=absolute", "--git-common-dir")
    _check_work_tree_is_here(root, git_dir)
    allowed = check_history(git, root, git_dir, common_dir)
    config = _read_config(git, root, None if allowed else (root, git_dir, common_dir))
    head, branch = _read_head(git)
    submodules = tuple(format_name(name) for name in list_submodules(git))
    origin = config.get("remote.origin.url")
    settings = tuple(
        (key, config[key].lower())
        for key, values in _COPIED_CORE.items()
        if config.get(key, "").lower() in values
    )
    relative = os.path.relpath(start, root)
    return Repository(
        root=root,
        git_dir=git_dir,
        common_dir=common_dir,
        subdirectory="" if relative == "." else relative,
        name=sanitise_name(root.name),
        head_commit=head,
        branch=branch,
        origin=strip_credentials(origin) if origin else None,
        user_name=config.get("user.name"),
        user_email=config.get("user.email"),
        submodules=submodules,
        sparse=dict(settings).get("core.sparsecheckout") == "true",
        partial="extensions.partialclone" in config
        or any(k.startswith("remote.") and k.endswith(".promisor") for k in config),
        object_format=object_format,
        settings=settings,
    )


def precheck(path: Path, options: ShipOptions, *, scratch_parent: Path | None = None) -> Repository:
    """`inspect_repository`, and what the options ask of this repository; needs no VM.

    Raises:
        BangerError: as `inspect_repository`; submodules, an unborn branch or a REF that the mode
            cannot ship; uncommitted changes that do not apply to REF.
    """
    repository = inspect_repository(path)
    check_mode(repository, options)
    if resolve_target(repository, options) != repository.head_commit:
        with open_scratch(repository, scratch_parent) as scratch:
            select(scratch, options)
    return repository


def _get_directory(path: Path) -> Path:
    try:
        start = path.resolve(strict=True)
    except OSError as e:
        raise BangerError(
            "not_found", f"opening the workspace {path}: {e.strerror}", hint=f"ls -ld {path}"
        ) from e
    except RuntimeError as e:  # a loop of symlinks, before Python 3.13
        raise BangerError("bad_request", f"opening the workspace {path}: {e}") from e
    if not start.is_dir():
        raise BangerError(
            "bad_request",
            f"the workspace {path} is not a directory",
            hint=f"banger vm run {shlex.quote(str(start.parent))}",
        )
    return start


def _refusal(start: Path, stderr: bytes, status: int) -> BangerError:
    here = shlex.quote(str(start))
    if b"dubious ownership" in stderr or b"safe.directory" in stderr:
        # git names the directory to except, which is not always the one we asked about.
        words = stderr.decode(errors="replace")
        fix = [line.strip() for line in words.splitlines() if "--add safe.directory" in line]
        return BangerError(
            "operation_failed",
            f"git does not trust the repository at {start}: it belongs to another user",
            hint=fix[0] if fix else f"git config --global --add safe.directory {here}",
            reason="safe_directory",
        )
    if b"not a git repository" in stderr:
        # A `.git` that git cannot read, or whose half is missing, is no reason to make another.
        for entry in (directory / ".git" for directory in (start, *start.parents)):
            if os.path.lexists(entry):
                return BangerError(
                    "operation_failed",
                    f"git does not take {entry} for a repository{_why_not(entry)}",
                    hint=f"ls -la {shlex.quote(str(entry))}",
                    reason="not_a_repository",
                )
        return BangerError(
            "bad_request",
            f"{start} is not inside a git repository",
            hint=f"git init {here} && git -C {here} add .",
            reason="not_a_repository",
        )
    return failure(f"inspecting {start}", stderr, status)


def _why_not(entry: Path) -> str:
    try:
        (entry / "HEAD").open("rb").close() if entry.is_dir() else entry.open("rb").close()
    except OSError as e:
        return f": {e.filename}: {e.strerror}"
    return ""


def _check_work_tree_is_here(root: Path, git_dir: Path) -> None:
    """`core.worktree` could name `/`, and the index `home/user/.ssh/id_ed25519`: a work tree counts
    only when its own `.git` leads to this git directory."""
    entry = root / ".git"
    if entry.is_file():
        named = entry.read_bytes()[: 2 * os.pathconf("/", "PC_PATH_MAX")]
        entry = root / os.fsdecode(named.removeprefix(b"gitdir:").strip())
    if entry.resolve() != git_dir:
        raise BangerError(
            "bad_request",
            f"the repository {git_dir} sets its work tree to {root}, which is not where it lies",
            hint=f"git --git-dir {shlex.quote(str(git_dir))} config --unset core.worktree",
        )


def _path_of(git: Git, *query: str) -> Path:
    out = git.run("rev-parse", *query, doing="inspecting the repository")
    return Path(os.fsdecode(out.removesuffix(b"\n"))).resolve()


def _read_config(git: Git, root: Path, inside: tuple[Path, ...] | None) -> dict[str, str]:
    """The configuration as git sees it; of several values the last counts. Keys are as git prints
    them: section and key in lower case.

    What the repository includes from other places than `inside` does not count: it could be the
    configuration of another one, whose origin and identity would go along.
    """
    out = git.run(
        "config", "--list", "-z", "--show-scope", "--show-origin",
        doing="reading the repository's configuration",
    )  # fmt: skip
    words = out.split(b"\0")[:-1]
    config = {}
    for scope, origin, item in zip(words[::3], words[1::3], words[2::3], strict=True):
        if inside is not None and os.fsdecode(scope) not in PROTECTED_SCOPES:
            file = find_path(root / os.fsdecode(origin.removeprefix(b"file:")))
            if file is None or not any(file.is_relative_to(known) for known in inside):
                continue
        key, equals, value = item.partition(b"\n")
        # A key alone is a true boolean.
        config[os.fsdecode(key)] = os.fsdecode(value) if equals else "true"
    return config


def _read_head(git: Git) -> tuple[str | None, str | None]:
    commit = git.try_run("rev-parse", "--verify", "--quiet", "--end-of-options", "HEAD^{commit}")
    symbolic = git.try_run("symbolic-ref", "--quiet", "HEAD")
    head = commit.stdout.decode().strip() or None if commit.returncode == 0 else None
    ref = os.fsdecode(symbolic.stdout.removesuffix(b"\n"))
    branch = None
    if symbolic.returncode == 0 and ref.startswith("refs/heads/"):
        branch = ref.removeprefix("refs/heads/")
        check_branch(git, branch)
    if head is None and branch is None:
        raise failure("resolving HEAD", commit.stderr or b"HEAD names no commit", 1)
    if head is None and git.try_run("rev-parse", "--verify", "--quiet", "HEAD").returncode == 0:
        # The branch names a commit and the commit is not there: broken, not unborn.
        raise failure(f"resolving HEAD of {ref or 'the repository'}", b"its commit is missing", 1)
    return head, branch
