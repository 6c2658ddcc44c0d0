"""A repository as it was found, and what may be asked of it: plain values and pure refusals."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.workspace.git import Git, source_git

if TYPE_CHECKING:
    from banger.workspace.options import ShipOptions


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """A repository with a work tree. Paths are absolute and resolved.

    `subdirectory` is PATH inside it (empty at the root); `name` is what the directory is called in
    the guest. `head_commit` is None on an unborn branch, `branch` None on a detached HEAD.
    `settings` are the few `core.*` values that the copy needs, lower case, checked.
    """

    root: Path
    git_dir: Path
    common_dir: Path
    subdirectory: str
    name: str
    head_commit: str | None
    branch: str | None
    origin: str | None
    user_name: str | None
    user_email: str | None
    submodules: tuple[str, ...]
    sparse: bool
    partial: bool
    object_format: str
    settings: tuple[tuple[str, str], ...]

    @property
    def objects(self) -> Path:
        return self.common_dir / "objects"

    def setting(self, key: str) -> str | None:
        return dict(self.settings).get(key)

    def git(self) -> Git:
        return source_git(self.root)


def check_mode(repository: Repository, options: ShipOptions) -> None:
    """Refuse what the mode cannot ship."""
    here = shlex.quote(str(repository.root))
    if options.mode != "full_copy" and repository.submodules:
        listed = ", ".join(repository.submodules[:5])
        raise BangerError(
            "bad_request",
            f"{repository.root} has submodules ({listed}), "
            f"which the workspace mode {options.mode} does not ship",
            hint=f"banger vm run {here} --mode full_copy",
            reason="submodules",
        )
    if options.mode == "metadata_only" and repository.head_commit is None:
        raise BangerError(
            "bad_request",
            f"{repository.root} has no commit yet, so metadata_only has nothing to ship",
            hint=f"git -C {here} commit, or --mode shallow_overlay",
        )
    if options.mode == "full_copy" and options.branch is not None:
        raise BangerError(
            "bad_request",
            "--branch does not go with --mode full_copy, which ships the checkout as it is",
            hint="--mode shallow_overlay",
        )


def resolve_target(repository: Repository, options: ShipOptions) -> str | None:
    """The commit that the guest checks out; None on an unborn branch.

    Raises:
        BangerError: bad_request: `--from` without `--branch`, a branch name that git refuses, a REF
            that names no commit.
    """
    if options.branch is None:
        if options.from_ref is not None:
            raise BangerError(
                "bad_request", "--from needs --branch: it says where the new branch begins"
            )
        return repository.head_commit
    check_branch(repository.git(), options.branch)
    ref = options.from_ref if options.from_ref is not None else "HEAD"
    if ref == "HEAD" and repository.head_commit is not None:
        return repository.head_commit
    # Two steps: `:/words` takes everything that follows as words.
    git = repository.git()
    named = git.try_run("rev-parse", "--verify", "--quiet", "--end-of-options", ref)
    commit = f"{named.stdout.decode().strip()}^{{commit}}"
    done = git.try_run("rev-parse", "--verify", "--quiet", "--end-of-options", commit)
    if named.returncode != 0 or done.returncode != 0:
        raise BangerError(
            "bad_request",
            f"{ref!r} names no commit in {repository.root}",
            hint=f"git -C {shlex.quote(str(repository.root))} log --oneline --all",
        )
    return done.stdout.decode().strip()


def check_branch(git: Git, branch: str) -> None:
    """Refuse a name that cannot be a branch (git-check-ref-format(1))."""
    bad = branch.startswith("-") or branch == "HEAD"
    if bad or git.try_run("check-ref-format", f"refs/heads/{branch}").returncode != 0:
        raise BangerError(
            "bad_request",
            f"{branch!r} cannot be the name of a branch",
            hint="git check-ref-format --branch NAME",
        )
