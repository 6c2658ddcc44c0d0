"""Exports: bases, commits, filters, repositories inside, and what the user did meanwhile."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from banger.errors import BangerError
from banger.rpc.trees import Entry, GuestFiles, Record
from banger.workspace.export import find_changes, open_source_ground
from banger.workspace.landed import Applied, HostFacts, apply_changes, read_changes, write_changes
from banger.workspace.manifest import (
    accept_offer,
    find_manifest,
    write_manifest,
    write_offer,
)
from banger.workspace.options import ShipOptions
from fakes.guest_files import GuestHost
from workspace_kit import ENVIRONMENT, commit, git, head, make_repository, status, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "source")
    write(repository, "file", "one\ntwo\n")
    write(repository, "sub/other", "other\n")
    write(repository, ".gitignore", "*.o\n")
    commit(repository)
    return repository


def _work(copy: Path) -> None:
    git(copy, "config", "user.name", "Guest")
    git(copy, "config", "user.email", "guest@example.org")
    write(copy, "file", "one\nTWO\n")
    git(copy, "commit", "-q", "-a", "--author", "Bob <bob@example.org>", "-m", "In the guest")
    write(copy, "sub/other", "changed\n")


def test_commits_of_the_guest_are_in_the_patch_unless_head_is_the_base(
    guests: GuestHost, source: Path
) -> None:
    guests.prepare(source)
    _work(guests.path())
    assert guests.patch(source)[1].names == ("M file", "M sub/other")
    assert guests.patch(source, head(source))[1].names == ("M file", "M sub/other")
    patch, exported = guests.patch(source, "HEAD")
    assert exported.names == ("M sub/other",)
    assert exported.base_commit == head(guests.path())
    assert b"In the guest" not in patch


def test_base_that_only_the_guest_has_needs_its_git(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    _work(guests.path())
    guests.git = False
    with pytest.raises(BangerError, match="no git in the guest"):
        guests.patch(source, "HEAD")
    assert guests.patch(source)[1].changed == 2
    guests.git = True
    with pytest.raises(BangerError, match="names no commit"):
        guests.patch(source, "no-such-commit")


def test_bundle_brings_commits_back_with_author_and_message(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    guests.prepare(source)
    assert guests.bundle(source)[0] == b""
    _work(guests.path())
    bundle, exported = guests.bundle(source)
    assert exported.changed == 1 and exported.names[0].endswith("In the guest")
    file = tmp_path / "work.bundle"
    file.write_bytes(bundle)
    git(source, "pull", "-q", "--ff-only", str(file))
    assert head(source) == head(guests.path())
    assert git(source, "log", "-1", "--format=%an %ae %s") == b"Bob bob@example.org In the guest\n"


def test_tar_holds_what_git_does_not_ignore(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    write(guests.path(), "new", "new").chmod(0o700)
    write(guests.path(), "x.o", "object")
    out = io.BytesIO()
    guests.tar(source, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        found = {m.name: (m.mode, m.uid) for m in tar if not m.isdir()}
    assert found == {
        "file": (0o644, 0), "new": (0o755, 0), "sub/other": (0o644, 0), ".gitignore": (0o644, 0),
    }  # fmt: skip


def test_tar_leads_nobody_through_a_link_that_it_brings(
    guests: GuestHost, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest can list what no directory holds: a link, and a file below it."""
    guests.prepare(source)
    record = Record(1, 1, 1)
    listed = {
        b"a": Entry(stat.S_IFLNK | 0o777, 4, record),
        b"a/b": Entry(stat.S_IFREG | 0o644, 1, record),
    }
    lies = io.BytesIO()
    with tarfile.open(fileobj=lies, mode="w") as tar:
        link, file = tarfile.TarInfo("a"), tarfile.TarInfo("a/b")
        link.type, link.linkname, file.size = tarfile.SYMTYPE, "/tmp", 1
        tar.addfile(link)
        tar.addfile(file, io.BytesIO(b"x"))
    lies.seek(0)
    honest = GuestFiles.get

    def get(self: GuestFiles, path: str, names: list[bytes], receive: Any) -> Any:
        return receive(lies) if b"a/b" in names else honest(self, path, names, receive)

    monkeypatch.setattr(GuestFiles, "scan", lambda *_: listed)
    monkeypatch.setattr(GuestFiles, "get", get)
    out = io.BytesIO()
    with pytest.raises(BangerError, match="a file below a file"):
        guests.tar(source, out)


def test_repository_that_was_never_prepared_is_compared_with_its_own_head(
    guests: GuestHost, source: Path
) -> None:
    subprocess.run(["git", "clone", "-q", source, guests.path("own")], env=ENVIRONMENT, check=True)
    write(guests.path("own"), "file", "mine\n")
    _, exported = guests.patch(None, name="own")
    assert exported.names == ("M file",)
    with pytest.raises(BangerError, match="no directory"):
        guests.patch(None, name="absent")


def test_sha256_repository_comes_back(guests: GuestHost, tmp_path: Path) -> None:
    source = make_repository(tmp_path / "long", "--object-format=sha256")
    write(source, "file", "one\n")
    commit(source)
    guests.prepare(source)
    assert guests.patch(source)[0] == b""
    write(guests.path(), "file", "two\n")
    git(guests.path(), "commit", "-qam", "there")
    git(source, "apply", "--index", stdin=guests.patch(source)[0])
    assert (source / "file").read_text() == "two\n"
    bundle = tmp_path / "b"
    git(source, "reset", "-q", "--hard")
    bundle.write_bytes(guests.bundle(source)[0])
    git(source, "pull", "-q", str(bundle))
    assert head(source) == head(guests.path())


def test_partial_clone_goes_in_and_comes_back(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    write(source, "file", "newer\n")
    commit(source)
    git(source, "config", "uploadpack.allowFilter", "true")
    partial = tmp_path / "partial"
    subprocess.run(
        ["git", "clone", "-q", "--filter=blob:none", f"file://{source}", partial],
        env=ENVIRONMENT, check=True,
    )  # fmt: skip
    guests.prepare(partial)
    write(guests.path(), "file", "two\n")
    patch, exported = guests.patch(partial)
    assert exported.names == ("M file",)
    git(partial, "apply", "--index", stdin=patch)
    write(partial, "sub/other", "mine\n")
    assert guests.prepare(partial).sent == 1


@pytest.mark.parametrize("autocrlf", ["true", "input", "false"])
def test_converted_line_ends_are_no_change(guests: GuestHost, source: Path, autocrlf: str) -> None:
    write(source, ".gitattributes", "*.bat text eol=crlf\n")
    write(source, "run.bat", "a\r\nb\r\n")
    commit(source)
    git(source, "config", "core.autocrlf", autocrlf)
    git(source, "rm", "-q", "--cached", "-r", ".")
    git(source, "reset", "-q", "--hard")
    guests.prepare(source)
    assert guests.patch(source)[0] == b""
    write(guests.path(), "run.bat", "a\r\nB\r\n")
    patch, _ = guests.patch(source)
    assert patch.count(b"\n-") == 2 and b"\n-b\n" in patch  # the header's and one line
    git(source, "apply", "--binary", stdin=patch)
    assert (source / "run.bat").read_bytes() == b"a\r\nB\r\n"


def test_filtered_files_are_no_change_and_no_filter_runs(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    git(source, "config", "filter.x.clean", "tr a-z A-Z")
    git(source, "config", "filter.x.smudge", "tr A-Z a-z")
    write(source, ".gitattributes", "*.big filter=x\n")
    write(source, "one.big", "content")
    write(source, "two.big", "content")
    commit(source)
    assert git(source, "cat-file", "blob", "HEAD:one.big") == b"CONTENT"
    # So old that git believes its index without looking at the content.
    for name in ("one.big", "two.big"):
        os.utime(source / name, (1, 1))
    git(source, "update-index", "--refresh", check=False)
    git(source, "config", "filter.x.clean", f"touch {ran}; cat")
    guests.prepare(source)
    copy = guests.path()
    assert (copy / "one.big").read_text() == "content"
    assert guests.patch(source)[0] == b""
    write(copy, "two.big", "other content")
    assert guests.patch(source)[1].names == ("M two.big",)
    assert [c.name for c in guests.changes(source)] == [b"two.big"]
    assert not ran.exists()


def test_sparse_files_are_no_deletions(guests: GuestHost, source: Path) -> None:
    git(source, "sparse-checkout", "set", "--no-cone", "/file", "/.gitignore")
    assert not (source / "sub").exists()
    guests.prepare(source)
    assert guests.patch(source)[0] == b""
    git(guests.path(), "sparse-checkout", "disable")
    assert guests.patch(source)[0] == b""


def test_linked_worktree_detached_head_and_unborn_branch(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    git(source, "worktree", "add", "-q", "--detach", str(linked))
    empty = make_repository(tmp_path / "empty")
    write(empty, "staged", "s")
    git(empty, "add", "-A")
    for name, repository in (("linked", linked), ("empty", empty)):
        guests.prepare(repository, name=name)
        write(guests.path(name), "new", "n")
        patch, _ = guests.patch(repository, name=name)
        assert b"new file mode 100644" in patch
        git(repository, "apply", "--check", "--binary", "--include=new", stdin=patch)
        assert guests.prepare(repository, name=name).sent == 0


def test_submodules_are_named_when_they_changed_and_never_exported(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    inner = make_repository(tmp_path / "inner")
    write(inner, "in", "in\n")
    commit(inner)
    git(source, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "mod")
    commit(source)
    guests.prepare(source, ShipOptions(mode="full_copy"))
    assert guests.patch(source)[0] == b"" and not guests.heard.warnings
    write(guests.path(), "mod/in", "changed\n")
    subprocess.run(["git", "init", "-q", guests.path() / "cloned"], env=ENVIRONMENT, check=True)
    write(guests.path(), "cloned/file", "x")
    patch, _ = guests.patch(source)
    assert patch == b""
    assert "cloned, mod" in guests.heard.warnings[-1]


def test_names_that_git_cannot_hold_are_left_out(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    for name in (".GIT/config", "sub/git~1/x", "sub/.git /y"):
        write(guests.path(), name, "x")
    write(guests.path(), "good", "x")
    assert guests.patch(source)[1].names == ("A good",)
    assert ".GIT/config" in guests.heard.warnings[0]


def test_guests_own_configuration_changes_nothing(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    copy = guests.path()
    write(copy, "file", "one\nTWO\n")
    plain = guests.patch(source)[0]
    for key, value in (
        ("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false"),
        ("core.autocrlf", "true"), ("core.attributesFile", "/x"), ("core.hooksPath", "/x"),
    ):  # fmt: skip
        git(copy, "config", key, value)
    write(copy, ".git/info/attributes", "* -diff filter=x\n")
    assert guests.patch(source)[0] == plain
    # What info/exclude leaves out is the guest's own to say.
    write(copy, "new", "x")
    write(copy, ".git/info/exclude", "new\n")
    assert guests.patch(source)[0] == plain


# Applying


def _apply(guests: GuestHost, source: Path, spoil: bytes | None = None) -> Applied:
    where = guests.source(source, None)
    with open_source_ground(where) as ground:
        stream = io.BytesIO()
        write_changes(ground.work, find_changes(where, ground)[0], stream)
    data = stream.getvalue()
    stream = io.BytesIO(data if spoil is None else data.replace(b"\nTWO", spoil))
    return apply_changes(HostFacts(source, "sha1", True), read_changes(stream), stream)


def test_applying_keeps_what_the_user_did_elsewhere(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    write(guests.path(), "file", "one\nTWO\n")
    write(source, "sub/other", "mine\n")
    write(source, "untracked", "mine\n")
    assert _apply(guests, source).written == (("M", b"file"),)
    assert status(source) == [b" M file", b" M sub/other", b"?? untracked"]
    assert (source / "file").read_text() == "one\nTWO\n"
    assert _apply(guests, source).done == (b"file",)
    # What the host has now is no loss: the guest is brought up to date without force.
    guests.prepare(source)
    assert (guests.path() / "sub/other").read_text() == "mine\n"


@pytest.mark.parametrize("kind", ["edit", "delete", "link", "directory", "new"])
def test_nothing_is_applied_when_the_user_changed_a_file_as_well(
    guests: GuestHost, source: Path, kind: str
) -> None:
    guests.prepare(source)
    copy = guests.path()
    write(copy, "aaa", "first of all\n")
    write(copy, "file", "one\nTWO\n")
    write(copy, "sub/deep/new", "new\n")
    outside = write(source.parent, "outside/new", "keep")
    if kind == "edit":
        write(source, "file", "mine\n")
    elif kind == "delete":
        (source / "file").unlink()
    elif kind == "link":
        (source / "sub/deep").symlink_to(outside.parent)
    elif kind == "directory":
        (source / "file").unlink()
        write(source, "file/inside", "mine")
    else:
        write(source, "sub/deep/new", "mine")
    before = git(source, "status", "--porcelain", "-uall")
    with pytest.raises(BangerError) as refused:
        _apply(guests, source)
    assert refused.value.reason == "conflict"
    assert git(source, "status", "--porcelain", "-uall") == before
    assert outside.read_text() == "keep"
    assert not list(source.glob(".banger*"))


def test_cut_stream_applies_nothing(guests: GuestHost, source: Path) -> None:
    guests.prepare(source)
    write(guests.path(), "file", "one\nTWO\n")
    where = guests.source(source, None)
    with open_source_ground(where) as ground:
        stream = io.BytesIO()
        write_changes(ground.work, find_changes(where, ground)[0], stream)
    data = stream.getvalue()
    for length in (50, 600, len(data) - 1300):
        cut = io.BytesIO(data[:length])
        with pytest.raises(BangerError):
            apply_changes(HostFacts(source, "sha1", True), read_changes(cut), cut)
        assert status(source) == []
        assert sorted(p.name for p in source.iterdir()) == [".git", ".gitignore", "file", "sub"]


@pytest.mark.parametrize(
    "data",
    [b"0 - 100644 ab\0../evil\0\0", b"0 - 100644 ab\0.git/config\0\0", b"0 -\0x\0\0",
     b"0 - 160000 ab\0x\0\0", b"0 - 100644 zz\0x\0\0", b"x" * 9000, b"0 - 0 -\0x"],
)  # fmt: skip
def test_malformed_list_of_changes_is_refused(data: bytes) -> None:
    with pytest.raises(BangerError):
        read_changes(io.BytesIO(data))


@pytest.mark.parametrize("inside", [(), ("deep/er",)])
def test_new_file_takes_the_place_of_an_empty_directory(
    guests: GuestHost, source: Path, inside: tuple[str, ...]
) -> None:
    """What is said to be possible must not end in the middle."""
    guests.prepare(source)
    write(guests.path(), "build", "a file\n")
    write(guests.path(), "zebra", "moved after it\n")
    (source / "build").mkdir()
    for name in inside:
        (source / "build" / name).mkdir(parents=True)
    assert not _apply(guests, source).conflicts
    assert (source / "build").read_text() == "a file\n"
    assert (source / "zebra").read_text() == "moved after it\n"


def test_directory_that_fills_again_while_changes_come_is_a_conflict(
    guests: GuestHost, source: Path
) -> None:
    guests.prepare(source)
    write(guests.path(), "build", "a file\n")
    write(source, "build/mine", "mine\n")
    with pytest.raises(BangerError) as e:
        _apply(guests, source)
    assert e.value.reason == "conflict"
    assert (source / "build/mine").read_text() == "mine\n"


def test_repository_made_in_the_guest_is_not_replaced_by_a_file_of_the_host(
    guests: GuestHost, source: Path
) -> None:
    """All else that is in that directory was shipped, and goes; its commits are nowhere else."""
    guests.prepare(source)
    inside = guests.path() / "sub"
    git(inside, "init", "-q", "-b", "main")
    kept = commit(inside)
    git(source, "rm", "-q", "-r", "sub")
    write(source, "sub", "a file now\n")
    git(source, "add", "-A")
    with pytest.raises(BangerError) as refused:
        guests.prepare(source)
    assert refused.value.reason == "changed_in_guest"
    assert "sub/.git" in refused.value.message
    assert head(inside) == kept


def test_offer_made_before_another_prepare_changes_nothing(
    guests: GuestHost, source: Path, tmp_path: Path
) -> None:
    """Between a client that applies and its word that it has, another may have prepared again."""
    first = guests.prepare(source).manifest
    write_manifest(tmp_path, first)
    offer = write_offer(tmp_path, first)
    write(source, "file", "newer\n")
    commit(source)
    second = guests.prepare(source).manifest
    write_manifest(tmp_path, second)
    assert not accept_offer(tmp_path, first.workspace.guest_path, offer)
    assert find_manifest(tmp_path, first.workspace.guest_path) == second
