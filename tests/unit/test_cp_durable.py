"""A name only for what is on the disk: the order of syncfs and rename when a directory comes."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from banger.errors import BangerError
from banger.workspace import landing, partial
from banger.workspace.landing import Landing
from banger.workspace.partial import gathered


class Watch:
    """What had reached the disk when a file got its name, and how often the disk was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on_disk: set[int] = set()
        self.too_early: list[bytes] = []
        self.syncs = 0
        self.fails = False
        self.root: Path | None = None
        rename = os.rename

        def watched(source: Any, target: Any, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            st = os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False)
            if st.st_ino not in self.on_disk:
                self.too_early.append(os.fsencode(target))
            rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        monkeypatch.setattr(os, "rename", watched)
        for module in (landing, partial):
            monkeypatch.setattr(module, "sync_filesystem", self.sync)

    def sync(self, fd: int) -> None:
        if self.fails:
            raise OSError(5, "Input/output error")
        self.syncs += 1
        assert self.root is not None
        self.on_disk = {p.lstat().st_ino for p in self.root.rglob("*")}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Watch:
    found = Watch(monkeypatch)
    found.root = tmp_path
    return found


def _land(place: Landing, name: bytes, content: bytes) -> None:
    place.file(name.split(b"/"), len(content), BytesIO(content).read, mode=0o640)


def test_new_directory_gets_its_name_after_its_files_are_on_the_disk(
    watch: Watch, tmp_path: Path
) -> None:
    with gathered(tmp_path / "new") as place, Landing(place, "x") as into:
        _land(into, b"d/file", b"content")
        watch.too_early.clear()  # inside nobody looks yet
    assert (watch.syncs, watch.too_early) == (1, [])
    assert (tmp_path / "new/d/file").read_bytes() == b"content"


def test_files_of_a_directory_that_is_there_get_their_names_when_they_are_on_the_disk(
    watch: Watch, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with Landing(tmp_path, "x", durable=True) as into:
        _land(into, b"old", b"first")
        _land(into, b"old", b"second")
        _land(into, b"d/file", b"content")
        into.symlink([b"d", b"link"], b"file")
        into.hardlink([b"other"], [b"d", b"file"])
        assert (tmp_path / "old").read_bytes() == b"old"
    assert (watch.syncs, watch.too_early) == (1, [])
    assert (tmp_path / "old").read_bytes() == b"second"
    assert (tmp_path / "other").samefile(tmp_path / "d/file")
    assert (tmp_path / "d/link").read_bytes() == b"content"
    assert not list(tmp_path.rglob(".banger-*"))


def test_many_files_do_not_wait_for_the_last(watch: Watch, tmp_path: Path) -> None:
    with Landing(tmp_path, "x", durable=True) as into:
        for number in range(2500):
            _land(into, b"%d" % number, b"")
        assert watch.syncs == 2
    assert (watch.syncs, watch.too_early) == (3, [])
    assert len(list(tmp_path.iterdir())) == 2500


def test_what_has_come_before_a_failure_is_kept(watch: Watch, tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="cut"), Landing(tmp_path, "x", durable=True) as into:
        _land(into, b"whole", b"content")
        into.file([b"half"], 9, BytesIO(b"1234").read, mode=0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
    assert watch.too_early == []


def test_disk_that_fails_leaves_the_old_file_and_nothing_else(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    watch.fails = True
    with (
        pytest.raises(BangerError, match="writing file: Input/output error"),
        Landing(tmp_path, "x", durable=True) as into,
    ):
        _land(into, b"file", b"new")
        _land(into, b"d/file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d", "file"]
