"""The guest's index and refs, read without git, as git on the host reads them."""

from __future__ import annotations

import socket
import struct
import tracemalloc
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.rpc.trees import GuestFiles
from banger.workspace.guest_git import fetch_refs, fetch_tracked, parse_index
from fakes.guest_files import GuestHost, make_request
from workspace_kit import commit, git, head, make_repository, write


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("form", ["sha1", "sha256"])
def test_names_and_flags_of_an_index_are_those_that_git_lists(
    version: int, form: str, tmp_path: Path
) -> None:
    repository = make_repository(tmp_path / "r", f"--object-format={form}")
    for name in (b"a", b"a/b".replace(b"/", b"-"), b"dir/x", b"dir/xy\xff\n", b"l" * 200, b"z"):
        write(repository, name)
    git(repository, "add", "-A")
    git(repository, "update-index", "--index-version", str(version))
    if version > 2:
        git(repository, "update-index", "--skip-worktree", "dir/x", "z")
    index = (repository / ".git/index").read_bytes()
    found = parse_index(index, form)
    assert found.names == set(git(repository, "ls-files", "-z").split(b"\0")[:-1])
    assert found.skipped == ({b"dir/x", b"z"} if version > 2 else set())


def test_damaged_index_is_an_error(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    write(repository, "file")
    git(repository, "add", "-A")
    index = (repository / ".git/index").read_bytes()
    for spoiled in (b"", b"DIRC", index[:40], b"XXXX" + index[4:], index[:8] + b"\xff" * 4):
        with pytest.raises(BangerError):
            parse_index(spoiled, "sha1")


def test_split_index_and_refs_are_read_from_the_guest(guests: GuestHost) -> None:
    copy = make_repository(guests.path())
    write(copy, "one")
    first = commit(copy)
    git(copy, "branch", "packed")
    git(copy, "pack-refs", "--all")
    git(copy, "update-index", "--split-index")
    write(copy, "two")
    commit(copy)
    tracked = fetch_tracked(guests.files, str(copy), "sha1")
    assert tracked.names == {b"one", b"two"}
    refs = fetch_refs(guests.files, str(copy))
    assert refs.head == "ref: refs/heads/main"
    assert refs.refs == {"refs/heads/main": head(copy), "refs/heads/packed": first}
    assert refs.loose == {"refs/heads/main"}
    assert refs.commit == head(copy)


def _index_of_4(count: int, first: bytes) -> bytes:
    """An index of version 4: a first name, then one that is a byte longer than the last, again and
    again."""
    entry = bytes(40 + 20 + 2)
    rest = (entry + b"\0x\0") * (count - 1)
    return struct.pack(">4sII", b"DIRC", 4, count) + entry + b"\0" + first + b"\0" + rest


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(_index_of_4(1000, b"n" * 100_000), id="names that no file can have"),
        pytest.param(_index_of_4(3000, b"n" * 1000), id="names that are the last one and more"),
    ],
)
def test_index_that_unpacks_to_more_than_it_is_takes_no_memory(
    index: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.workspace.guest_git.MAX_NAME_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(BangerError, match="reading the guest's index: "):
            parse_index(index, "sha1")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_vm_that_is_gone_is_named_and_not_its_directory() -> None:
    def refuse() -> socket.socket:
        raise BangerError("not_found", "there is no VM 'web'", hint="banger vm list")

    with pytest.raises(BangerError, match="there is no VM 'web'"):
        fetch_refs(GuestFiles(refuse, make_request), "/root/repo")


def test_directory_that_is_gone_is_named(guests: GuestHost, tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="there is no directory"):
        fetch_refs(guests.files, str(tmp_path / "nothing"))
