"""What arrives: files, history, status; git in the unpacked copy is the judge."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.files import format_shipped, list_shipped
from banger.workspace.inspect import inspect_repository
from banger.workspace.options import ShipOptions
from banger.workspace.pack import pack
from workspace_kit import (
    commit,
    git,
    head,
    make_project,
    make_repository,
    reference,
    ship,
    status,
    tracked_files,
    write,
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_project(tmp_path / "repo")


def test_clean_checkout_arrives_clean(repository: Path, tmp_path: Path) -> None:
    shipped = ship(repository, tmp_path)
    assert status(shipped.copy) == []
    assert tracked_files(shipped.copy) == tracked_files(repository)
    assert (shipped.result.base_commit, shipped.result.branch) == (head(repository), "main")
    assert shipped.git("symbolic-ref", "HEAD") == b"refs/heads/main\n"
    assert shipped.fsck() == "0"


def test_staged_and_unstaged_changes_arrive_as_uncommitted(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, "src/main.c", "staged\n")
    write(repository, "new", "new\n")
    git(repository, "add", "-A")
    write(repository, "src/main.c", "then changed\n")
    (repository / "src/old.c").unlink()
    write(repository, "secret.env", "not tracked\n")
    shipped = ship(repository, tmp_path)
    assert status(shipped.copy) == [b" D src/old.c", b" M src/main.c", b"?? new"]
    assert shipped.names == [b"link", b"new", b"run.sh", b"src/main.c"]
    assert (shipped.copy / "src/main.c").read_text() == "then changed\n"


def test_untracked_files_go_only_when_asked_and_never_ignored_ones(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, ".gitignore", "*.o\n")
    write(repository, "x.o", "object")
    write(repository, "note", "text")
    inner = make_repository(repository / "inner")
    write(inner, "f")
    commit(inner)
    assert ship(repository, tmp_path).names == [b"link", b"run.sh", b"src/main.c", b"src/old.c"]
    shipped = ship(repository, tmp_path, ShipOptions(include_untracked=True))
    assert {b".gitignore", b"note"} < set(shipped.names)
    assert not {b"x.o", b"inner/f"} & set(shipped.names)


def test_dry_run_prints_one_line_for_each_file(repository: Path) -> None:
    write(repository, "two\nlines", "x")
    git(repository, "add", "-A")
    names = list_shipped(inspect_repository(repository), ShipOptions())
    assert format_shipped(names) == 'link\nrun.sh\nsrc/main.c\nsrc/old.c\n"two\\nlines"\n'


def test_modes_times_and_owner(repository: Path, tmp_path: Path) -> None:
    (repository / "src/main.c").chmod(0o600)
    (repository / "src/old.c").chmod(0o666)
    (repository / "run.sh").chmod(0o4777)
    os.utime(repository / "run.sh", (1_500_000_000, 1_500_000_000))
    shipped = ship(repository, tmp_path)
    with tarfile.open(shipped.archive) as tar:
        members = {m.name: m for m in tar.getmembers()}
    modes = {n: members[n].mode for n in ("src/main.c", "src/old.c", "run.sh")}
    assert modes == {"src/main.c": 0o644, "src/old.c": 0o644, "run.sh": 0o755}
    assert members["run.sh"].mtime == 1_500_000_000
    assert {(m.uid, m.gid) for m in members.values()} == {(0, 0)}


def test_result_counts_what_a_receiver_counts(repository: Path, tmp_path: Path) -> None:
    shipped = ship(repository, tmp_path)
    with tarfile.open(shipped.archive) as tar:
        files = [m for m in tar.getmembers() if not m.isdir()]
    assert shipped.result.stream_files == len(files)
    assert shipped.result.stream_bytes == sum(m.size for m in files)
    assert shipped.result.file_count == 4


def test_history_is_ten_deep(repository: Path, tmp_path: Path) -> None:
    for number in range(15):
        write(repository, "src/main.c", str(number))
        commit(repository, str(number))
    git(repository, "commit-graph", "write", "--reachable")
    git(repository, "gc", "-q")
    shipped = ship(repository, tmp_path)
    log = git(repository, "log", "--format=%H %s", "-10")
    assert shipped.git("log", "--format=%H %s") == log
    assert shipped.fsck() == "0"


def test_history_with_merges_is_what_a_shallow_clone_has(repository: Path, tmp_path: Path) -> None:
    for number in range(8):
        git(repository, "checkout", "-q", "-b", f"side{number}", "HEAD~0")
        for step in range(number % 3 + 1):
            write(repository, f"side{number}", str(step))
            commit(repository, f"side {number} {step}")
        git(repository, "checkout", "-q", "main")
        write(repository, f"main{number}", "x")
        commit(repository, f"main {number}")
        git(repository, "merge", "-q", "--no-ff", "-m", f"merge {number}", f"side{number}")
    clone = tmp_path / "clone"
    git(
        tmp_path, "clone", "-q", "--no-local", "--depth=10", "--single-branch",
        f"file://{repository}", str(clone),
    )  # fmt: skip
    shipped = ship(repository, tmp_path)
    listing = ("rev-list", "--objects", "--all", "--no-object-names")
    assert set(shipped.git(*listing).split()) == set(git(clone, *listing).split())
    assert (shipped.copy / ".git/shallow").read_text() == (clone / ".git/shallow").read_text()


def test_shallow_clone_is_shipped_with_its_own_boundary(repository: Path, tmp_path: Path) -> None:
    for number in range(5):
        commit(repository, str(number))
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth=3", f"file://{repository}", str(clone))
    shipped = ship(clone, tmp_path)
    assert len(shipped.git("log", "--format=%H").split()) == 3
    assert shipped.fsck() == "0"


def test_linked_worktree_becomes_a_repository_of_its_own(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    write(tmp_path / "side", "src/main.c", "changed in the worktree\n")
    shipped = ship(tmp_path / "side", tmp_path)
    assert (shipped.copy / ".git").is_dir()
    assert status(shipped.copy) == [b" M src/main.c"]
    assert shipped.result.branch == "side"


def test_borrowed_objects_come_along(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user has said that the repository may borrow: test_workspace_trust.py."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, ".gitconfig", f"[banger]\n\ttrustedRepository = {tmp_path}/clone\n")
    odd = repository.rename(tmp_path / 'o"d \\name')
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--shared", str(odd), str(clone))
    assert not list((clone / ".git/objects").glob("??"))
    shipped = ship(clone, tmp_path)
    assert not (shipped.copy / ".git/objects/info/alternates").exists()
    assert shipped.fsck() == "0"


def test_directory_with_an_odd_name(repository: Path, tmp_path: Path) -> None:
    odd = repository.rename(tmp_path / 'o"d\n\\name #1')
    assert ship(odd, tmp_path).fsck() == "0"


def test_detached_head_stays_detached(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    shipped = ship(repository, tmp_path)
    assert shipped.result.branch is None
    assert (shipped.copy / ".git/HEAD").read_text().strip() == head(repository)
    assert status(shipped.copy) == []


def test_unborn_branch_ships_the_index_and_an_empty_history(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    write(repository, "staged", "1")
    git(repository, "add", "-A")
    write(repository, "other", "2")
    shipped = ship(repository, tmp_path)
    assert shipped.result.base_commit is None
    assert status(shipped.copy) == [b"?? staged"]
    assert shipped.git("symbolic-ref", "HEAD") == b"refs/heads/main\n"
    commit(shipped.copy, "first")
    assert shipped.fsck() == "0"


def test_repository_without_any_file_is_shipped(tmp_path: Path) -> None:
    shipped = ship(make_repository(tmp_path / "r"), tmp_path)
    assert (shipped.names, shipped.result.file_count) == ([], 0)
    assert status(shipped.copy) == []


def test_sha256_repository(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r", "--object-format=sha256")
    write(repository, "f", "1")
    commit(repository)
    write(repository, "f", "2")
    shipped = ship(repository, tmp_path)
    assert status(shipped.copy) == [b" M f"]
    assert shipped.fsck() == "0"
    shipped.git("add", "-A")
    assert shipped.git("write-tree").decode().strip() == shipped.result.tree_id


def test_sparse_checkout_is_not_a_deletion(repository: Path, tmp_path: Path) -> None:
    write(repository, "docs/page", "text")
    commit(repository)
    git(repository, "sparse-checkout", "set", "docs")
    assert not (repository / "src").exists()
    shipped = ship(repository, tmp_path)
    assert status(shipped.copy) == []
    assert not (shipped.copy / "src").exists()
    shipped.git("sparse-checkout", "disable")
    assert (shipped.copy / "src/main.c").read_text() == "int main;\n"


def test_sparse_index_is_not_a_deletion(repository: Path, tmp_path: Path) -> None:
    write(repository, "docs/page", "text")
    commit(repository)
    git(repository, "sparse-checkout", "set", "--cone", "--sparse-index", "docs")
    assert status(ship(repository, tmp_path).copy) == []
    metadata = ship(repository, tmp_path, ShipOptions(mode="metadata_only"))
    assert status(metadata.copy) == []


def test_flags_of_the_index_are_kept(repository: Path, tmp_path: Path) -> None:
    git(repository, "update-index", "--skip-worktree", "src/old.c")
    git(repository, "update-index", "--assume-unchanged", "src/main.c")
    (repository / "src/old.c").unlink()
    write(repository, "src/main.c", "a local change that status does not show")
    assert status(repository) == []
    shipped = ship(repository, tmp_path)
    assert status(shipped.copy) == []
    assert (shipped.copy / "src/main.c").read_text().startswith("a local change")


@pytest.mark.parametrize("leave_out", ["blob:none", "tree:0"])
def test_partial_clone_is_shipped_without_what_it_does_not_have(
    repository: Path, tmp_path: Path, leave_out: str
) -> None:
    for number in range(3):
        write(repository, "src/main.c", str(number))
        write(repository, f"docs/{number}", str(number))
        commit(repository, str(number))
    git(repository, "config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "partial"
    git(tmp_path, "clone", "-q", f"--filter={leave_out}", f"file://{repository}", str(clone))
    repository.rename(tmp_path / "gone")  # nothing can be fetched any more
    write(clone, "run.sh", "changed")
    shipped = ship(clone, tmp_path)
    assert status(shipped.copy) == status(clone)
    assert shipped.fsck() == "0"
    assert shipped.git("log", "--format=%s") == b"2\n1\n0\nfirst\n"


def test_partial_and_sparse_clone(repository: Path, tmp_path: Path) -> None:
    write(repository, "docs/page", "text")
    commit(repository)
    git(repository, "config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "partial"
    git(
        tmp_path, "clone", "-q", "--filter=blob:none", "--sparse", f"file://{repository}",
        str(clone),
    )  # fmt: skip
    repository.rename(tmp_path / "gone")
    shipped = ship(clone, tmp_path)
    assert shipped.names == [b"link", b"run.sh"]
    assert status(shipped.copy) == []
    assert shipped.fsck() == "0"


def test_intent_to_add_is_shipped_and_shown_as_new(repository: Path, tmp_path: Path) -> None:
    write(repository, "soon", "x")
    git(repository, "add", "-N", "soon")
    assert status(ship(repository, tmp_path).copy) == [b"?? soon"]


def test_unmerged_file_is_shipped_once_with_its_markers(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "-b", "side")
    write(repository, "src/main.c", "side\n")
    commit(repository)
    git(repository, "checkout", "-q", "main")
    write(repository, "src/main.c", "main\n")
    commit(repository)
    git(repository, "merge", "side", check=False)
    shipped = ship(repository, tmp_path)
    assert shipped.names.count(b"src/main.c") == 1
    assert status(shipped.copy) == [b" M src/main.c"]
    assert "<<<<<<<" in (shipped.copy / "src/main.c").read_text()


@pytest.mark.parametrize("setting", ["true", "input", "false"])
def test_line_ends_stay_as_on_disk_and_status_stays_clean(
    repository: Path, tmp_path: Path, setting: str
) -> None:
    write(repository, ".gitattributes", "*.bat text eol=crlf\n")
    write(repository, "x.bat", "one\r\ntwo\r\n")
    commit(repository)
    git(repository, "config", "core.autocrlf", setting)
    (repository / "src/main.c").unlink()
    git(repository, "checkout", "--", "src/main.c")
    assert status(repository) == []
    shipped = ship(repository, tmp_path)
    assert (shipped.copy / "x.bat").read_bytes() == b"one\r\ntwo\r\n"
    ending = b"\r\n" if setting == "true" else b"\n"
    assert (shipped.copy / "src/main.c").read_bytes() == b"int main;" + ending
    assert status(shipped.copy) == []


def test_file_mode_that_git_does_not_trust_is_taken_from_the_index(
    repository: Path, tmp_path: Path
) -> None:
    git(repository, "config", "core.filemode", "false")
    (repository / "run.sh").chmod(0o644)
    (repository / "src/main.c").chmod(0o755)
    shipped = ship(repository, tmp_path)
    assert os.access(shipped.copy / "run.sh", os.X_OK)
    assert (shipped.copy / "src/main.c").stat().st_mode & 0o777 == 0o644


def test_replacements_and_grafts_do_not_count(repository: Path, tmp_path: Path) -> None:
    first = head(repository)
    write(repository, "src/main.c", "second\n")
    second = commit(repository, "second")
    git(repository, "replace", second, first)
    (repository / ".git/info/grafts").write_text(f"{second}\n")
    shipped = ship(repository, tmp_path)
    assert shipped.git("log", "--format=%H").decode().split() == [second, first]
    assert shipped.fsck() == "0"


def test_directory_replaced_by_a_symlink_is_not_followed(repository: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, "main.c", "somebody's secret")
    (repository / "src").rename(repository / "moved")
    (repository / "src").symlink_to(outside)
    shipped = ship(repository, tmp_path)
    assert shipped.names == [b"link", b"run.sh"]
    assert b"secret" not in shipped.archive.read_bytes()
    assert status(shipped.copy) == [b" D src/main.c", b" D src/old.c"]


def test_fifo_in_place_of_a_tracked_file_is_left_out_with_a_warning(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "run.sh").unlink()
    os.mkfifo(repository / "run.sh")
    warnings: list[str] = []

    class Listener:
        def stage(self, stage: str, label: str, detail: str = "") -> None: ...

        def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

        def warn(self, message: str) -> None:
            warnings.append(message)

    out = io.BytesIO()
    result = pack(inspect_repository(repository), ShipOptions(), out, reporter=Listener())
    assert result.file_count == 3
    assert len(warnings) == 1 and "run.sh" in warnings[0]


def test_index_that_names_a_file_outside_is_refused(repository: Path) -> None:
    index = (repository / ".git/index").read_bytes()
    assert b"src/main.c" in index
    forged = index.replace(b"src/main.c", b"../x/mai.c")[:-20]
    digest = hashlib.sha1(forged, usedforsecurity=False).digest()
    (repository / ".git/index").write_bytes(forged + digest)
    with pytest.raises(BangerError, match="no checkout can hold"):
        inspect_repository(repository)


def test_configuration_carries_no_credential_and_no_program(
    repository: Path, tmp_path: Path
) -> None:
    git(repository, "remote", "add", "origin", "https://me:hunter2@example.org/x.git")
    for key, value in (
        ("http.extraHeader", "Authorization: hunter2"),
        ("filter.x.clean", "hunter2"),
        ("alias.st", "!hunter2"),
        ("core.sshCommand", "hunter2"),
        ("user.name", 'Ada "the\tfirst\n[core] fsmonitor = x'),
    ):
        git(repository, "config", key, value)
    (repository / ".git/hooks/post-checkout").write_text("hunter2")
    shipped = ship(repository, tmp_path)
    for path in (shipped.copy / ".git").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()
    assert shipped.git("config", "user.name") == b'Ada "the\tfirst\n[core] fsmonitor = x\n'
    assert shipped.git("config", "remote.origin.url") == b"https://example.org/x.git\n"
    assert not (shipped.copy / ".git/hooks").exists()


def test_metadata_only_ships_the_commit_without_the_changes(
    repository: Path, tmp_path: Path
) -> None:
    write(repository, "src/main.c", "changed")
    (repository / "src/old.c").unlink()
    write(repository, "new", "x")
    git(repository, "add", "new")
    git(repository, "rm", "-q", "--cached", "run.sh")
    shipped = ship(repository, tmp_path, ShipOptions(mode="metadata_only"))
    assert status(shipped.copy) == []
    assert shipped.names == [b"link", b"run.sh", b"src/main.c", b"src/old.c"]
    assert shipped.result.tree_id == git(repository, "rev-parse", "HEAD^{tree}").decode().strip()


def test_copy_equals_the_reference_made_with_cp(repository: Path, tmp_path: Path) -> None:
    write(repository, "src/main.c", "changed")
    write(repository, "untracked", "x")
    shipped = ship(repository, tmp_path, ShipOptions(include_untracked=True))
    expected = reference(repository, tmp_path / "reference", include_untracked=True)
    assert tracked_files(shipped.copy) == tracked_files(expected)
    assert status(shipped.copy) == status(expected)
