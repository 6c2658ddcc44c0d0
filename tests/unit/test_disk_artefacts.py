"""The build cache, file identities and the disk reserve."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from banger.disk.artefacts import built_artefacts, inputs_key
from banger.disk.background import Job
from banger.disk.identity import FileChanged, check_identity, identify
from banger.disk.space import require_space
from banger.errors import BangerError, explain_disk_full
from banger.units import TIB


class Builder:
    """Counts how often it was asked, and writes that number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, staging: Path) -> None:
        self.calls += 1
        (staging / "rootfs").write_text(f"build {self.calls}")


def get(cache: Path, key: str, builder: Builder, *, refresh: bool = False) -> str:
    with built_artefacts(cache, key, builder, job=Job(), refresh=refresh) as built:
        return (built / "rootfs").read_text()


def test_what_was_built_is_not_built_again(tmp_path: Path) -> None:
    builder = Builder()
    assert [get(tmp_path, "k", builder) for _ in range(2)] == ["build 1", "build 1"]


def test_other_inputs_replace_the_artefacts_of_that_name(tmp_path: Path) -> None:
    builder = Builder()
    get(tmp_path, "old", builder)
    get(tmp_path, "new", builder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "new"]


def test_refresh_builds_anew(tmp_path: Path) -> None:
    builder = Builder()
    get(tmp_path, "k", builder)
    assert get(tmp_path, "k", builder, refresh=True) == "build 2"


def test_a_damaged_artefact_is_built_again(tmp_path: Path) -> None:
    builder = Builder()
    get(tmp_path, "k", builder)
    damaged = tmp_path / "k" / "rootfs"
    before = damaged.stat()
    damaged.chmod(0o644)
    damaged.write_text("damage!")
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert get(tmp_path, "k", builder) == "build 2"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(staging: Path) -> None:
        (staging / "part").touch()
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        built_artefacts(tmp_path, "k", build, job=Job()),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".build-0123abcd").mkdir()
    get(tmp_path, "k", Builder())
    assert not (tmp_path / ".build-0123abcd").exists()


def test_two_that_want_the_same_build_it_once(tmp_path: Path) -> None:
    builder = Builder()
    threads = [threading.Thread(target=get, args=(tmp_path, "k", builder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.calls == 1


def test_the_borders_between_inputs_count() -> None:
    assert inputs_key(["ab", "c"]) != inputs_key(["a", "bc"])


def test_a_file_with_another_time_and_the_same_content_passes(tmp_path: Path) -> None:
    file = tmp_path / "rootfs"
    file.write_text("content")
    known = identify(file)
    os.utime(file, ns=(1, known.mtime_ns + 1))
    assert check_identity(file, known).mtime_ns == known.mtime_ns + 1


@pytest.mark.parametrize("content", ["CONTENT", "content and more"])
def test_a_file_with_other_content_is_found_out(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rootfs"
    file.write_text("content")
    known = identify(file)
    file.write_text(content)
    os.utime(file, ns=(1, known.mtime_ns + 1))
    with pytest.raises(FileChanged, match="rootfs"):
        check_identity(file, known)


def test_a_missing_file_is_found_out(tmp_path: Path) -> None:
    file = tmp_path / "rootfs"
    file.touch()
    known = identify(file)
    file.unlink()
    with pytest.raises(FileChanged, match="No such file"):
        check_identity(file, known)


def test_a_step_that_would_touch_the_reserve_is_refused_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(BangerError) as caught:
        require_space(
            tmp_path / "not" / "yet", needed_bytes=0, reserve_bytes=900 * TIB, doing="pulling k"
        )
    assert caught.value.reason == "disk_full"
    assert "pulling k" in caught.value.message


def test_a_step_with_room_passes(tmp_path: Path) -> None:
    require_space(tmp_path, needed_bytes=1, reserve_bytes=0, doing="pulling k")


def test_a_disk_that_fills_up_on_the_way_is_called_so() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/state/x")
    converted = BangerError("operation_failed", "unpacking linux")
    converted.__cause__ = full
    for error in (full, converted):
        explained = explain_disk_full(error)
        assert isinstance(explained, BangerError)
        assert explained.reason == "disk_full"


def test_other_errors_stay_what_they_are() -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("x")):
        assert explain_disk_full(error) is error
