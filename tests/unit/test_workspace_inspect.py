"""What PATH is, and every reason to refuse it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.index import list_untracked
from banger.workspace.inspect import inspect_repository, precheck
from banger.workspace.options import ShipOptions
from workspace_kit import commit, git, head, make_repository, write


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "my repo")
    write(repository, "dir/file", "1")
    commit(repository)
    return repository


def refuse(path: Path, options: ShipOptions | None = None) -> BangerError:
    with pytest.raises(BangerError) as caught:
        precheck(path, options or ShipOptions())
    return caught.value


def test_facts_of_an_ordinary_repository(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://me:secret@example.org/x.git")
    found = inspect_repository(repository / "dir")
    assert (found.root, found.subdirectory, found.name) == (repository, "dir", "my-repo")
    assert (found.head_commit, found.branch) == (head(repository), "main")
    assert found.origin == "https://example.org/x.git"
    assert (found.user_name, found.user_email) == ("Ada", "ada@example.org")
    assert (found.sparse, found.partial, found.object_format) == (False, False, "sha1")


def test_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    assert inspect_repository(repository).branch is None


def test_unborn_branch_has_a_name_and_no_commit(tmp_path: Path) -> None:
    found = inspect_repository(make_repository(tmp_path / "r"))
    assert (found.head_commit, found.branch) == (None, "main")


def test_linked_worktree_is_a_repository_of_its_own(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    found = inspect_repository(tmp_path / "side")
    assert (found.root, found.branch) == (tmp_path / "side", "side")
    assert found.common_dir == repository / ".git"


def test_path_through_a_symlink_is_resolved(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(repository)
    assert inspect_repository(tmp_path / "link").root == repository


def test_root_with_a_newline_in_its_name(tmp_path: Path) -> None:
    odd = make_repository(tmp_path / "a\nb\n")
    assert inspect_repository(odd).root == odd


def test_missing_path_is_not_found(tmp_path: Path) -> None:
    error = refuse(tmp_path / "nothing")
    assert error.code == "not_found"
    assert "No such file" in error.message


def test_file_is_refused_and_its_directory_proposed(repository: Path) -> None:
    error = refuse(repository / "dir/file")
    assert "is not a directory" in error.message
    assert error.hint is not None and "dir" in error.hint


def test_directory_without_repository_hints_at_git_init(tmp_path: Path) -> None:
    error = refuse(tmp_path)
    assert error.reason == "not_a_repository"
    assert error.hint is not None and error.hint.startswith(f"git init {tmp_path}")


@pytest.fixture
def without_might(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git is told what a user is told: root reads everything."""
    if os.geteuid() == 0:
        (tmp_path / "bin").mkdir()
        git = tmp_path / "bin/git"
        caps = "-dac_override,-dac_read_search"
        git.write_text(
            f'#!/bin/sh\nexec setpriv --bounding-set {caps} {shutil.which("git")} "$@"\n'
        )
        git.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_repository_that_cannot_be_read_is_not_to_be_made_anew(
    repository: Path, without_might: None
) -> None:
    (repository / ".git").chmod(0)
    try:
        error = refuse(repository / "dir")
    finally:
        (repository / ".git").chmod(0o755)
    assert (error.code, error.reason) == ("operation_failed", "not_a_repository")
    assert f"git does not take {repository}/.git for a repository" in error.message
    assert error.hint == f"ls -la '{repository}/.git'"


def test_half_a_repository_is_told_with_what_it_lacks(repository: Path) -> None:
    (repository / ".git/HEAD").unlink()
    assert refuse(repository).message.endswith(
        f": {repository}/.git/HEAD: No such file or directory"
    )


@pytest.mark.parametrize("name", ["hidden", ".gitignore"])
def test_untracked_files_are_not_listed_where_git_may_not_look(
    repository: Path, without_might: None, name: str
) -> None:
    """They would silently stay at home, or ignored ones would silently go."""
    if name == "hidden":
        (repository / name).mkdir()
    write(repository, "hidden/work" if name == "hidden" else name, "secret\n")
    (repository / name).chmod(0)
    try:
        with pytest.raises(BangerError, match=f"listing untracked files.*{name}.*denied"):
            list_untracked(inspect_repository(repository).git())
    finally:
        (repository / name).chmod(0o755)


def test_bare_repository_is_refused(tmp_path: Path) -> None:
    assert "bare" in refuse(make_repository(tmp_path / "b.git", "--bare")).message


def test_inside_of_dot_git_is_refused(repository: Path) -> None:
    assert "inside a git directory" in refuse(repository / ".git/objects").message


def test_submodules_are_refused_with_the_mode_that_ships_them(
    repository: Path, tmp_path: Path
) -> None:
    inner = make_repository(tmp_path / "inner")
    commit(inner)
    git(
        repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add",
        str(inner), "sub",
    )  # fmt: skip
    for options in (ShipOptions(), ShipOptions(mode="metadata_only")):
        error = refuse(repository, options)
        assert error.reason == "submodules"
        assert "sub" in error.message
        assert error.hint is not None and "--mode full_copy" in error.hint
    assert precheck(repository, ShipOptions(mode="full_copy")).submodules == ("sub",)


def test_repository_of_another_user_names_the_command_that_trusts_it(repository: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a repository to another user")
    for directory, names, files in os.walk(repository):
        for name in (".", *names, *files):
            os.lchown(os.path.join(directory, name), 12345, 12345)
    error = refuse(repository)
    assert error.reason == "safe_directory"
    assert error.hint is not None
    assert error.hint.startswith("git config --global --add safe.directory")
    assert str(repository) in error.hint


def test_work_tree_set_elsewhere_is_refused(repository: Path) -> None:
    """The index could then name any file of the user."""
    git(repository, "config", "core.worktree", "/")
    assert "work tree" in refuse(repository).message


def test_head_that_names_a_missing_commit_is_broken_not_unborn(repository: Path) -> None:
    (repository / ".git/refs/heads/main").write_text("1" * 40 + "\n")
    assert "missing" in refuse(repository).message


def test_from_needs_a_branch(repository: Path) -> None:
    assert "--from needs --branch" in refuse(repository, ShipOptions(from_ref="HEAD")).message


@pytest.mark.parametrize("branch", ["-x", "a..b", "HEAD", "a b", "", "x.lock", "@{-1}", "a\nb"])
def test_name_that_is_no_branch_is_refused(repository: Path, branch: str) -> None:
    assert "name of a branch" in refuse(repository, ShipOptions(branch=branch)).message


@pytest.mark.parametrize("ref", ["nope", "--all", "HEAD:dir", "", "-h"])
def test_ref_that_names_no_commit_is_refused(repository: Path, ref: str) -> None:
    error = refuse(repository, ShipOptions(branch="new", from_ref=ref))
    assert "names no commit" in error.message


def test_new_branch_on_an_unborn_one_is_refused(tmp_path: Path) -> None:
    error = refuse(make_repository(tmp_path / "r"), ShipOptions(branch="new"))
    assert "names no commit" in error.message


def test_metadata_of_an_unborn_branch_is_refused(tmp_path: Path) -> None:
    error = refuse(make_repository(tmp_path / "r"), ShipOptions(mode="metadata_only"))
    assert "no commit yet" in error.message
