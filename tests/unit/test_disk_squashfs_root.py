"""The root directory of a squashfs that another user than root has written; unsquashfs judges."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from banger.disk import squashfs
from banger.disk.background import Job
from banger.disk.squashfs import open_tar_writer, write_squashfs
from banger.disk.squashfs_root import SquashfsChanged, own_root_directory
from banger.errors import BangerError

pytestmark = pytest.mark.skipif(
    shutil.which("sqfstar") is None or shutil.which("unsquashfs") is None,
    reason="squashfs-tools is not installed",
)
WRITER = 1234


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """sqfstar runs as another user, without a user namespace; a directory it may write to."""
    if os.geteuid() == 0:
        program = tmp_path / "sqfstar"
        program.write_text(
            f"#!/bin/sh\nexec setpriv --reuid {WRITER} --regid {WRITER} --clear-groups "
            f'{shutil.which("sqfstar")} "$@"\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(squashfs.os, "geteuid", lambda: WRITER)
    # Not below tmp_path, which is closed to everybody else.
    with tempfile.TemporaryDirectory(prefix="bs") as place:
        os.chmod(place, 0o777)
        yield Path(place)


def feed(count: int, owners: tuple[int, ...]) -> Callable[[IO[bytes]], None]:
    def write(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            for number in range(count):
                info = tarfile.TarInfo(f"file-{number}-{'x' * (number % 90)}")
                info.uid, info.gid = owners[number % len(owners)], owners[-1]
                info.mtime = 1_600_000_000
                tar.addfile(info)

    return write


def owners_of(image: Path) -> list[str]:
    out = subprocess.run(["unsquashfs", "-lln", image], capture_output=True, text=True, check=True)
    return [line.split()[1] for line in out.stdout.splitlines()]


@pytest.mark.parametrize("count", [1, 2, 100, 254, 255, 256, 257, 3000])
def test_it_is_root_s_and_everything_else_keeps_its_owner(somebody: Path, count: int) -> None:
    owners = (0, WRITER, 1_000_000, 7, 0)
    write_squashfs(somebody / "x", feed(count, owners), job=Job())
    root, *files = owners_of(somebody / "x")
    assert root == "0/0"
    assert sorted(files) == sorted(f"{owners[n % 5]}/0" for n in range(count))


def test_thousands_of_owners_are_looked_through(somebody: Path) -> None:
    owners = (*range(100, 2600), 0)
    write_squashfs(somebody / "x", feed(2501, owners), job=Job())
    assert owners_of(somebody / "x")[0] == "0/0"


def test_one_in_which_nothing_is_root_s_stays_as_it_is(somebody: Path) -> None:
    write_squashfs(somebody / "x", feed(3, (1000,)), job=Job())
    assert owners_of(somebody / "x")[1:] == ["1000/1000"] * 3


def test_a_file_that_cannot_be_changed_is_refused_and_removed(
    somebody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squashfs, "UNCOMPRESSED", ())
    with pytest.raises(BangerError, match="compressed"):
        write_squashfs(somebody / "x", feed(500, (0, 1)), job=Job())
    assert not (somebody / "x").exists()


@pytest.mark.parametrize("cut", [0, 50, 100, 150])
def test_a_cut_file_is_refused(somebody: Path, cut: int) -> None:
    write_squashfs(somebody / "x", feed(3, (0,)), job=Job())
    (somebody / "cut").write_bytes((somebody / "x").read_bytes()[:cut])
    with pytest.raises(SquashfsChanged):
        own_root_directory(somebody / "cut")
