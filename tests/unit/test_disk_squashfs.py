"""squashfs files, judged by unsquashfs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from banger.disk.background import Job
from banger.disk.squashfs import open_tar_writer, write_squashfs
from banger.errors import BangerError

pytestmark = pytest.mark.skipif(
    shutil.which("sqfstar") is None or shutil.which("unsquashfs") is None,
    reason="squashfs-tools is not installed",
)


def member(name: str, *, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(content), 0o644, 1_600_000_000
    return info


def feed_file(name: str, content: bytes) -> Callable[[IO[bytes]], None]:
    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            tar.addfile(member(name, content=content), io.BytesIO(content))

    return feed


def listing(image: Path) -> str:
    return subprocess.run(
        ["unsquashfs", "-lln", image],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TZ": "UTC"},
    ).stdout


def test_a_file_arrives_with_owner_and_mode(tmp_path: Path) -> None:
    image = tmp_path / "x.sqfs"
    write_squashfs(image, feed_file("hello", b"world"), job=Job())
    last = listing(image).splitlines()[-1].split()
    assert last == ["-rw-r--r--", "0/0", "5", "2020-09-13", "12:26", "squashfs-root/hello"]
    done = subprocess.run(["unsquashfs", "-cat", image, "hello"], capture_output=True, check=True)
    assert done.stdout == b"world"


def test_the_root_directory_is_not_writable_by_others(tmp_path: Path) -> None:
    write_squashfs(tmp_path / "x.sqfs", feed_file("a", b""), job=Job())
    assert listing(tmp_path / "x.sqfs").startswith("drwxr-xr-x 0/0")


def test_all_root_overrides_the_stream(tmp_path: Path) -> None:
    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            info = member("a")
            info.uid = info.gid = 1000
            tar.addfile(info)

    write_squashfs(tmp_path / "x.sqfs", feed, job=Job(), all_root=True)
    assert "1000" not in listing(tmp_path / "x.sqfs")


def test_without_an_epoch_the_streams_times_stay(tmp_path: Path) -> None:
    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            info = member("a")
            info.mtime = 1_800_000_000
            tar.addfile(info)

    write_squashfs(tmp_path / "x.sqfs", feed, job=Job(), epoch=None)
    assert listing(tmp_path / "x.sqfs").splitlines()[-1].split()[3:5] == ["2027-01-15", "08:00"]


def test_the_same_stream_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_squashfs(tmp_path / name, feed_file("a", b"b" * 500_000), job=Job())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_binary_capability_survives(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")

    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            info = member("ping")
            info.pax_headers = {
                "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")
            }
            tar.addfile(info)

    write_squashfs(tmp_path / "x.sqfs", feed, job=Job())
    done = subprocess.run(
        ["unsquashfs", "-d", tmp_path / "out", tmp_path / "x.sqfs"],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("this user may not set capabilities")

    assert os.getxattr(tmp_path / "out/ping", "security.capability") == capability


@pytest.mark.parametrize("names", [("a", "a"), ("./",)])
def test_what_sqfstar_would_leave_out_in_silence_is_an_error(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            for name in names:
                kind = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                tar.addfile(member(name, kind=kind))

    with pytest.raises(BangerError, match="ignoring"):
        write_squashfs(tmp_path / "x.sqfs", feed, job=Job())
    assert not (tmp_path / "x.sqfs").exists()


def test_no_file_is_left_when_the_source_fails(tmp_path: Path) -> None:
    def feed(stream: IO[bytes]) -> None:
        stream.write(b"\0" * 700)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_squashfs(tmp_path / "x.sqfs", feed, job=Job())
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    def feed(stream: IO[bytes]) -> None:
        stream.write(b"no tar" * 1000)

    with pytest.raises(BangerError, match=r"x\.sqfs"):
        write_squashfs(tmp_path / "x.sqfs", feed, job=Job())
    assert not (tmp_path / "x.sqfs").exists()
