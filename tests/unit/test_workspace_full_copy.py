"""`--mode full_copy`: everything below the root as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.options import ShipOptions
from workspace_kit import commit, git, head, make_repository, ship, status, tracked_files, write

FULL = ShipOptions(mode="full_copy")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "repo")
    write(repository, ".gitignore", "build/\n")
    write(repository, "file", "0\n")
    commit(repository, "first")
    return repository


def test_ignored_untracked_and_empty_things_are_shipped(repository: Path, tmp_path: Path) -> None:
    write(repository, "build/out.o", "object")
    write(repository, "note", "untracked")
    (repository / "empty/inside").mkdir(parents=True)
    write(repository, b"odd\xff\n", "x")
    shipped = ship(repository, tmp_path, FULL)
    assert tracked_files(shipped.copy) == tracked_files(repository)
    assert (shipped.copy / "empty/inside").is_dir()
    assert status(shipped.copy) == status(repository)
    assert shipped.names == [b".gitignore", b"build/out.o", b"file", b"note", b"odd\xff\n"]


def test_index_is_as_it_was(repository: Path, tmp_path: Path) -> None:
    write(repository, "file", "staged\n")
    write(repository, "new", "x")
    git(repository, "add", "-A")
    write(repository, "file", "then changed\n")
    assert status(repository) == [b"A  new", b"MM file"]
    shipped = ship(repository, tmp_path, FULL)
    assert status(shipped.copy) == [b"A  new", b"MM file"]
    assert shipped.git("diff", "--cached") == git(repository, "diff", "--cached")
    assert shipped.fsck() == "0"


def test_split_index_arrives_in_one_piece(repository: Path, tmp_path: Path) -> None:
    git(repository, "update-index", "--split-index")
    write(repository, "new", "x")
    git(repository, "add", "-A")
    shipped = ship(repository, tmp_path, FULL)
    assert status(shipped.copy) == [b"A  new"]
    assert not list((shipped.copy / ".git").glob("sharedindex.*"))


def test_whole_history_branches_tags_and_stash_arrive(repository: Path, tmp_path: Path) -> None:
    for number in range(15):
        write(repository, "file", str(number))
        commit(repository, str(number))
    git(repository, "tag", "-a", "-m", "one", "v1", "HEAD~3")
    git(repository, "branch", "side", "HEAD~5")
    write(repository, "file", "stashed")
    git(repository, "stash", "-q")
    shipped = ship(repository, tmp_path, FULL)
    refs = git(repository, "for-each-ref")
    assert shipped.git("for-each-ref") == refs
    assert shipped.git("rev-list", "--all", "--count") == git(
        repository, "rev-list", "--all", "--count"
    )
    assert shipped.fsck() == "0"


def test_submodules_arrive_with_their_own_history(repository: Path, tmp_path: Path) -> None:
    inner = make_repository(tmp_path / "inner")
    write(inner, "f", "1")
    commit(inner)
    deeper = make_repository(tmp_path / "deeper")
    commit(deeper)
    allow = ("-c", "protocol.file.allow=always")
    git(inner, *allow, "submodule", "--quiet", "add", str(deeper), "deep")
    commit(inner)
    git(repository, *allow, "submodule", "--quiet", "add", str(inner), "sub")
    git(repository, *allow, "submodule", "--quiet", "update", "--init", "--recursive")
    commit(repository)
    write(repository, "sub/f", "changed")
    shipped = ship(repository, tmp_path, FULL)
    repository.rename(tmp_path / "gone")
    assert status(shipped.copy) == status(tmp_path / "gone") == [b" M sub"]
    assert head(shipped.copy / "sub") == head(inner)
    assert head(shipped.copy / "sub/deep") == head(deeper)
    assert git(shipped.copy, "fsck", "--strict") == b""
    assert git(shipped.copy / "sub", "fsck", "--strict") == b""


def test_worktree_and_unfinished_merge(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    write(repository, "file", "main\n")
    commit(repository)
    side = tmp_path / "side"
    write(side, "file", "side\n")
    commit(side)
    git(side, "merge", "main", check=False)
    shipped = ship(side, tmp_path, FULL)
    assert status(shipped.copy) == [b"UU file"]
    write(shipped.copy, "file", "resolved\n")
    commit(shipped.copy, "merged")
    assert len(shipped.git("rev-list", "--parents", "-1", "HEAD").split()) == 3
    assert shipped.fsck() == "0"


def test_unborn_repository_keeps_its_index(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    write(repository, "f", "1")
    git(repository, "add", "-A")
    write(repository, "loose", "2")
    shipped = ship(repository, tmp_path, FULL)
    assert status(shipped.copy) == [b"?? loose", b"A  f"]
    assert shipped.fsck().startswith("0 notice: HEAD points to an unborn branch (main)")


def test_broken_inner_repository_is_shipped_as_files(repository: Path, tmp_path: Path) -> None:
    write(repository, "inner/.git", "gitdir: /nowhere\n")
    write(repository, "inner/f", "1")
    shipped = ship(repository, tmp_path, FULL)
    assert (shipped.copy / "inner/f").exists()
    assert not (shipped.copy / "inner/.git").exists()


def test_link_in_the_git_directory_does_not_carry_a_file_out(
    repository: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for name in ("MERGE_MSG", "info/attributes", "sharedindex." + "0" * 40, "logs", "shared"):
        path = repository / ".git" / name
        if path.is_dir():
            for directory, _, files in os.walk(path, topdown=False):
                for file in files:
                    os.unlink(os.path.join(directory, file))
                os.rmdir(directory)
        path.symlink_to(secret)
    try:
        shipped = ship(repository, tmp_path, FULL)
    except Exception as e:
        assert "hunter2" not in str(e)
    else:
        assert b"hunter2" not in shipped.archive.read_bytes()


def test_directory_in_place_of_a_file_of_git_is_no_traceback(
    repository: Path, tmp_path: Path
) -> None:
    for name in ("MERGE_MSG", "info/attributes", "sharedindex." + "0" * 40):
        (repository / ".git" / name).mkdir(parents=True)
    with pytest.raises(BangerError, match="sharedindex.0+: it is not a plain file"):
        ship(repository, tmp_path, FULL)
    (repository / ".git" / ("sharedindex." + "0" * 40)).rmdir()
    assert ship(repository, tmp_path, FULL).fsck() == "0"


def test_partial_clone(repository: Path, tmp_path: Path) -> None:
    for number in range(3):
        write(repository, "file", str(number))
        commit(repository, str(number))
    git(repository, "config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "partial"
    git(tmp_path, "clone", "-q", "--filter=blob:none", f"file://{repository}", str(clone))
    repository.rename(tmp_path / "gone")
    shipped = ship(clone, tmp_path, FULL)
    assert status(shipped.copy) == []
    assert shipped.fsck() == "0"
