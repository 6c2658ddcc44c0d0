"""`--branch B --from REF`: the guest is on B at REF, with the user's changes when they apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.inspect import inspect_repository, precheck
from banger.workspace.options import ShipOptions
from workspace_kit import commit, git, head, make_repository, ship, status, write

FROM_OLD = ShipOptions(branch="fix/it", from_ref="old")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`old` has `only-old`, an older `both` and a directory `dir/`; main has `main-only`."""
    repository = make_repository(tmp_path / "repo")
    write(repository, "same", "same\n")
    write(repository, "both", "old\n")
    write(repository, "only-old", "x\n").chmod(0o755)
    write(repository, "dir/inside", "x\n")
    (repository / "link").symlink_to("old-target")
    commit(repository, "old")
    git(repository, "branch", "old")
    (repository / "only-old").unlink()
    (repository / "dir/inside").unlink()
    (repository / "link").unlink()
    (repository / "link").symlink_to("new-target")
    write(repository, "both", "new\n")
    write(repository, "main-only", "x\n")
    commit(repository, "new")
    return repository


def test_new_branch_at_head_keeps_the_changes(repository: Path, tmp_path: Path) -> None:
    write(repository, "both", "changed\n")
    shipped = ship(repository, tmp_path, ShipOptions(branch="fix/it"))
    assert shipped.git("symbolic-ref", "HEAD") == b"refs/heads/fix/it\n"
    assert (shipped.result.branch, shipped.result.base_commit) == ("fix/it", head(repository))
    assert status(shipped.copy) == [b" M both"]
    assert git(repository, "branch", "--list", "fix/it") == b""


def test_clean_checkout_becomes_the_other_commit(repository: Path, tmp_path: Path) -> None:
    shipped = ship(repository, tmp_path, FROM_OLD)
    old = git(repository, "rev-parse", "old").decode().strip()
    assert shipped.result.base_commit == head(shipped.copy) == old
    assert status(shipped.copy) == []
    assert shipped.names == [b"both", b"dir/inside", b"link", b"only-old", b"same"]
    assert (shipped.copy / "link").readlink() == Path("old-target")
    tree = git(repository, "rev-parse", "old^{tree}").decode().strip()
    assert shipped.result.tree_id == tree
    assert shipped.fsck() == "0"


def test_changes_of_files_that_are_the_same_in_both_are_laid_over(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, "same", "changed\n")
    write(repository, "added", "new\n")
    git(repository, "add", "added")
    write(repository, "loose", "untracked\n")
    shipped = ship(repository, tmp_path, FROM_OLD)
    assert status(shipped.copy) == [b" M same", b"?? added"]
    everything = ShipOptions(branch="b", from_ref="old", include_untracked=True)
    assert b"?? loose" in status(ship(repository, tmp_path, everything).copy)


def test_deletion_is_laid_over(repository: Path, tmp_path: Path) -> None:
    (repository / "same").unlink()
    assert status(ship(repository, tmp_path, FROM_OLD).copy) == [b" D same"]


def test_a_touched_file_is_not_a_change(repository: Path, tmp_path: Path) -> None:
    (repository / "both").touch()
    write(repository, "both", "new\n")
    assert status(ship(repository, tmp_path, FROM_OLD).copy) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("both", "changed\n"), ("main-only", "changed\n"), ("only-old", "untracked here\n"),
     ("dir", "a file where the other commit has a directory\n")],
)  # fmt: skip
def test_changes_that_do_not_apply_are_refused_and_named(
    repository: Path, tmp_path: Path, name: str, content: str
) -> None:
    if name == "dir":
        (repository / "dir").rmdir()
    write(repository, name, content)
    git(repository, "add", "-A")
    with pytest.raises(BangerError) as caught:
        precheck(repository, FROM_OLD)
    assert caught.value.reason == "changes_do_not_apply"
    assert name in caught.value.message
    assert "old" in caught.value.message


def test_untracked_file_that_the_other_commit_has_is_refused_when_it_is_shipped(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, "only-old", "mine\n")
    assert status(ship(repository, tmp_path, FROM_OLD).copy) == []
    with pytest.raises(BangerError, match="only-old"):
        ship(
            repository,
            tmp_path,
            ShipOptions(branch="b", from_ref="old", include_untracked=True),
        )


def test_metadata_only_ships_the_other_commit_whatever_has_changed(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, "both", "changed\n")
    options = ShipOptions(branch="b", from_ref="old", mode="metadata_only")
    shipped = ship(repository, tmp_path, options)
    assert status(shipped.copy) == []
    assert (shipped.copy / "both").read_text() == "old\n"


def test_commit_outside_of_the_window_brings_its_own_history(
    repository: Path, tmp_path: Path
) -> None:
    for number in range(20):
        commit(repository, str(number))
    shipped = ship(repository, tmp_path, FROM_OLD)
    assert shipped.git("log", "--format=%s") == b"old\n"
    assert len(shipped.git("log", "--format=%s", "main").splitlines()) == 10
    assert shipped.fsck() == "0"


@pytest.mark.parametrize("ref", ["HEAD~1", "main~1", "v1", ":/old"])
def test_ref_may_be_anything_that_names_a_commit(
    repository: Path, tmp_path: Path, ref: str
) -> None:
    git(repository, "tag", "-a", "-m", "one", "v1", "old")
    shipped = ship(repository, tmp_path, ShipOptions(branch="b", from_ref=ref))
    assert head(shipped.copy) == git(repository, "rev-parse", "old").decode().strip()


@pytest.mark.parametrize("branch", ["main/sub", "main"])
def test_new_branch_may_collide_with_the_users_branch(
    repository: Path, tmp_path: Path, branch: str
) -> None:
    shipped = ship(repository, tmp_path, ShipOptions(branch=branch, from_ref="old"))
    commit(shipped.copy, "in the guest")
    assert shipped.git("branch", "--show-current").decode().strip() == branch
    assert shipped.fsck() == "0"


def test_line_ends_do_not_count_as_changes(repository: Path, tmp_path: Path) -> None:
    git(repository, "config", "core.autocrlf", "true")
    for name in ("both", "same"):
        (repository / name).unlink()
    git(repository, "checkout", "--", "both", "same")
    assert (repository / "both").read_bytes() == b"new\r\n"
    (repository / "both").touch()
    shipped = ship(repository, tmp_path, FROM_OLD)
    assert status(shipped.copy) == []
    assert (shipped.copy / "same").read_bytes() == b"same\r\n"
    assert (shipped.copy / "both").read_bytes() == b"old\n"


def test_sparse_files_of_the_other_commit_stay_out(repository: Path, tmp_path: Path) -> None:
    git(repository, "sparse-checkout", "set", "--no-cone", "/both")
    shipped = ship(repository, tmp_path, FROM_OLD)
    assert status(shipped.copy) == []
    assert not (shipped.copy / "same").exists()


def test_split_index_is_understood(repository: Path, tmp_path: Path) -> None:
    git(repository, "update-index", "--split-index")
    write(repository, "same", "changed\n")
    git(repository, "add", "same")
    assert list((repository / ".git").glob("sharedindex.*"))
    assert status(ship(repository, tmp_path, FROM_OLD).copy) == [b" M same"]


def test_submodule_of_the_other_commit_is_refused(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "old")
    git(repository, "update-index", "--add", "--cacheinfo", f"160000,{head(repository)},sub")
    git(repository, "commit", "-q", "-m", "with a submodule")
    git(repository, "branch", "-f", "linked")
    git(repository, "checkout", "-q", "main")
    with pytest.raises(BangerError) as caught:
        ship(repository, tmp_path, ShipOptions(branch="b", from_ref="linked"))
    assert caught.value.reason == "submodules"


def test_full_copy_has_no_branch_option(repository: Path) -> None:
    options = ShipOptions(branch="b", mode="full_copy")
    with pytest.raises(BangerError, match="does not go with"):
        ship(repository, repository.parent, options)
    assert inspect_repository(repository).branch == "main"
