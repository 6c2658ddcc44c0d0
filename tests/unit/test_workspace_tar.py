"""The tar writer, judged by GNU tar and Python's tarfile."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from banger.workspace.tar import TarWriter, build_header

NAMES = [
    b"a", b"d/with space", b"new\nline", b"\xff\xfe", b"n" * 100, b"n" * 101, b"long/" * 60 + b"f",
    "süß".encode(), b"d/" + b"\xff" * 200, b"-rf", b"'; echo",
]  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    with path.open("wb") as out:
        tar = TarWriter(out)
        for number, name in enumerate(NAMES):
            if b"/" in name:
                tar.directory(name.rpartition(b"/")[0], mtime=1000)
            executable = number % 2 == 1
            mode = 0o755 if executable else 0o644
            tar.file(name, name * number, mode=mode, mtime=1_700_000_000 + number)
        tar.symlink(b"short link", b"a", mtime=5)
        tar.symlink(b"l" * 150, b"t" * 150, mtime=5)
        tar.finish()
    return path


def test_gnu_tar_unpacks_every_name_and_content(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    done = subprocess.run(
        ["tar", "-C", tmp_path / "x", "-xpf", archive], capture_output=True, check=True
    )
    assert done.stderr == b""
    root = os.fsencode(tmp_path / "x")
    for number, name in enumerate(NAMES):
        path = os.path.join(root, name)
        st = os.stat(path)
        assert Path(os.fsdecode(path)).read_bytes() == name * number
        assert (st.st_mode & 0o777, int(st.st_mtime)) == (
            0o755 if number % 2 else 0o644,
            1_700_000_000 + number,
        )
    assert os.readlink(os.path.join(root, b"l" * 150)) == b"t" * 150


def test_tarfile_reads_the_same_members_owned_by_root(archive: Path) -> None:
    with tarfile.open(archive, errors="surrogateescape", encoding="utf-8") as tar:
        members = tar.getmembers()
    files = [os.fsencode(m.name) for m in members if m.isreg()]
    assert files == NAMES
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert [m.linkname for m in members if m.issym()] == ["a", "t" * 150]


def test_a_size_beyond_eight_gib_and_odd_times_are_written() -> None:
    for size, mtime, read_back in ((10 << 30, -5, 0), (8 << 30, 1 << 40, 8**11 - 1), (3, 7, 7)):
        header = build_header(b"f", mode=0o644, size=size, mtime=mtime, kind=b"0")
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        assert (member.size, member.mtime) == (size, read_back)


def test_a_streamed_file_that_ends_early_is_filled_with_zeros(tmp_path: Path) -> None:
    out = io.BytesIO()
    tar = TarWriter(out)
    missing = tar.stream(b"f", 3_000_000, io.BytesIO(b"x" * 10).read, mode=0o644, mtime=0)
    tar.file(b"after", b"whole", mode=0o644, mtime=0)
    tar.finish()
    assert missing == 2_999_990
    out.seek(0)
    with tarfile.open(fileobj=out) as read:
        first, second = read.getmembers()
        assert first.size == 3_000_000
        after = read.extractfile(second)
        assert after is not None and after.read() == b"whole"


def test_a_streamed_file_that_has_grown_is_cut_at_its_size() -> None:
    out = io.BytesIO()
    tar = TarWriter(out)
    source = io.BytesIO(b"x" * 5_000)
    assert tar.stream(b"f", 700, source.read, mode=0o644, mtime=0) == 0
    tar.finish()
    out.seek(0)
    with tarfile.open(fileobj=out) as read:
        assert [m.size for m in read.getmembers()] == [700]


def test_a_raw_stream_that_takes_little_at_a_time_gets_everything() -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.taken = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            piece = bytes(cast("bytes", data))[:1000]
            self.taken += piece
            return len(piece)

    slow = Slow()
    tar = TarWriter(cast("BinaryIO", slow))
    tar.file(b"f", b"y" * 600_000, mode=0o644, mtime=0)
    tar.finish()
    with tarfile.open(fileobj=io.BytesIO(bytes(slow.taken))) as read:
        assert read.getmembers()[0].size == 600_000


def test_directories_are_written_once_and_before_their_files() -> None:
    out = io.BytesIO()
    tar = TarWriter(out)
    for name in (b"a/b/c", b"a/b", b"a/b/c"):
        tar.directory(name, mtime=0)
    tar.finish()
    out.seek(0)
    with tarfile.open(fileobj=out) as read:
        assert read.getnames() == ["a", "a/b", "a/b/c"]
        assert {m.mode for m in read.getmembers()} == {0o755}
