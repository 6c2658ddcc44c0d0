"""Files that appear whole, directories that are ours, copies that stay sparse."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import files
from banger.errors import BangerError
from patience import PATIENCE_S


def test_file_is_replaced_as_a_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, b"one")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"one", 0o600)
    files.write_atomic(path, b"two", mode=0o644)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two", 0o644)
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="full"):
        files.write_atomic(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["f"])


def test_file_is_synced_before_its_name_points_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*args: Any, _name: str = name, _real: Any = real) -> Any:
            order.append(_name)
            return _real(*args)

        monkeypatch.setattr(os, name, spy)
    files.write_atomic(tmp_path / "f", b"x")
    assert order == ["fsync", "replace", "fsync"]


# --- directories ----------------------------------------------------------------------------------


def test_private_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    path = files.ensure_private_directory(tmp_path / "a" / "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert files.ensure_private_directory(path) == path


def test_directory_of_ours_that_is_open_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir(mode=0o755)
    files.ensure_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["symlink", "file", "below a file"])
def test_what_is_no_directory_of_ours_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d"
    if kind == "symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        path.touch()
    else:
        path.touch()
        path = path / "below"
    with pytest.raises(BangerError, match=str(path)) as caught:
        files.ensure_private_directory(path)
    assert (caught.value.hint or "").startswith("ls -ld ")


def test_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another user made it first in a shared /tmp."""
    path = tmp_path / "d"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BangerError, match="belongs to uid"):
        files.ensure_private_directory(path)


def test_tree_is_removed_without_what_its_links_point_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert not tree.exists()
    assert (tmp_path / "kept" / "f").exists()


def test_staging_directory_is_private_and_goes_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.staging_directory(tmp_path / "p", "build") as path:
        (path / "half").touch()
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        raise RuntimeError
    assert os.listdir(tmp_path / "p") == []


# --- copies ---------------------------------------------------------------------------------------


def make_sparse(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> None:
    with path.open("wb") as f:
        f.truncate(size)
        for offset, data in pieces:
            f.seek(offset)
            f.write(data)


@given(
    st.integers(0, 1 << 20),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=5000)), max_size=4),
)
def test_clone_has_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, size: int, pieces: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("clone")
    source, target = directory / "a", directory / "b"
    make_sparse(source, size, pieces)
    files.clone(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_clone_of_a_sparse_file_is_sparse_and_private(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    make_sparse(source, 1 << 34, [(1 << 30, b"x" * 100_000), ((1 << 34) - 10, b"end")])
    source.chmod(0o444)
    files.clone(source, target)
    st = target.stat()
    assert (st.st_size, stat.S_IMODE(st.st_mode)) == (1 << 34, 0o600)
    assert st.st_blocks * 512 < 1 << 20
    with target.open("rb") as f:
        f.seek(1 << 30)
        assert f.read(100_000) == b"x" * 100_000
        f.seek(-10, os.SEEK_END)
        assert f.read() == b"end" + b"\0" * 7


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_clone_copies_where_the_filesystem_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    make_sparse(tmp_path / "a", 1 << 20, [(5000, b"data")])
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse) if number != errno.ENOTTY else None
    files.clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_clone_that_fails_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_sparse(tmp_path / "a", 1 << 20, [(0, b"data")])
    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match="No space"):
        files.clone(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_clone_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        files.clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"b"


@pytest.mark.parametrize("linkable", [True, False])
def test_immutable_file_gets_a_second_name_or_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkable: bool
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"content")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if not linkable:
        monkeypatch.setattr(os, "link", refuse)
    files.link_or_copy(source, target)
    assert target.read_bytes() == b"content"
    assert os.path.samefile(source, target) == linkable


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    assert files.sha256_file(tmp_path / "f") == hashlib.sha256(b"content").hexdigest()


# --- locks ----------------------------------------------------------------------------------------


_HOLDER = """
import sys
from pathlib import Path
from banger.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_is_held_between_processes_until_its_holder_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "lock")],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        fd = os.open(tmp_path / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        holder.kill()
        holder.wait(PATIENCE_S)
        with files.locked(tmp_path / "lock"):
            pass
    finally:
        holder.kill()
        holder.communicate()
