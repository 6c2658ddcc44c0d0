"""The stream while it is made: what it leaves behind, how it fails, how much memory it needs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace import pack as pack_module
from banger.workspace.inspect import inspect_repository
from banger.workspace.options import ShipOptions
from banger.workspace.pack import pack
from workspace_kit import (
    commit,
    git,
    make_project,
    make_repository,
    ship,
    write,
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_project(tmp_path / "repo")


def test_nothing_is_written_to_the_source(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "-b", "old")
    write(repository, "other", "x")
    commit(repository)
    git(repository, "checkout", "-q", "main")
    write(repository, "src/main.c", "changed")

    def census() -> list[tuple[str, int, int]]:
        found = [(str(p), p.lstat().st_mtime_ns, p.lstat().st_ino) for p in repository.rglob("*")]
        return sorted(found)

    before = census()
    for options in (
        ShipOptions(include_untracked=True),
        ShipOptions(mode="metadata_only"),
        ShipOptions(mode="full_copy"),
        ShipOptions(branch="b", from_ref="old"),
    ):
        ship(repository, tmp_path, options)
    assert census() == before


def test_temporary_files_are_gone_afterwards_and_after_a_failure(
    repository: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = inspect_repository(repository)
    pack(found, ShipOptions(), io.BytesIO(), scratch_parent=scratch)
    with pytest.raises(BangerError):
        pack(found, ShipOptions(), io.BytesIO(), scratch_parent=scratch, cancelled=lambda: True)
    assert list(scratch.iterdir()) == []


def test_cancelling_is_its_own_error_and_leaves_no_end_marker(repository: Path) -> None:
    asked = iter([False, True, True, True])
    out = io.BytesIO()
    with pytest.raises(BangerError) as caught:
        pack(inspect_repository(repository), ShipOptions(), out, cancelled=lambda: next(asked))
    assert caught.value.reason == "cancelled"


def test_missing_object_is_an_error_that_names_the_repository(repository: Path) -> None:
    blob = git(repository, "rev-parse", "HEAD:src/old.c").decode().strip()
    (repository / f".git/objects/{blob[:2]}/{blob[2:]}").unlink()
    with pytest.raises(BangerError, match=r"packing the history of .*repo"):
        pack(inspect_repository(repository), ShipOptions(), io.BytesIO())


def _change_while_reading(
    monkeypatch: pytest.MonkeyPatch, path: Path, change: Callable[[Path], None]
) -> None:
    real = os.read
    inode = path.stat().st_ino
    calls = 0

    def read(fd: int, most: int) -> bytes:
        nonlocal calls
        if os.fstat(fd).st_ino == inode:
            calls += 1
            if calls == 2:
                change(path)
        return real(fd, most)

    monkeypatch.setattr(pack_module.os, "read", read)


def test_file_that_shrinks_while_it_is_read_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = write(repository, "big.bin", bytes(5 << 20))
    git(repository, "add", "-A")
    _change_while_reading(monkeypatch, big, lambda p: os.truncate(p, 1 << 20))
    out = io.BytesIO()
    with pytest.raises(BangerError, match=r"big\.bin .*shorter while it was read"):
        pack(inspect_repository(repository), ShipOptions(), out)


def test_file_that_grows_while_it_is_read_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = write(repository, "big.bin", bytes(5 << 20))
    git(repository, "add", "-A")
    _change_while_reading(monkeypatch, big, lambda p: os.truncate(p, 9 << 20))
    with pytest.raises(BangerError, match=r"big\.bin .*longer while it was read"):
        pack(inspect_repository(repository), ShipOptions(), io.BytesIO())


class Nowhere(io.RawIOBase):
    """Takes everything, keeps nothing."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: object) -> int:
        size = len(memoryview(data))  # type: ignore[arg-type]
        self.size += size
        return size


def test_large_file_needs_little_memory(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    with (repository / "disk.img").open("wb") as f:
        f.truncate(400 << 20)
    git(repository, "update-index", "--add", "--cacheinfo",
        "100644,e69de29bb2d1d6434b8b29ae775ad8c2e48c5391,disk.img")  # fmt: skip
    out = Nowhere()
    tracemalloc.start()
    try:
        result = pack(inspect_repository(repository), ShipOptions(), out)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.byte_count == 400 << 20 < out.size
    assert peak < 16 << 20


def test_fifty_thousand_files_need_little_memory(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    for number in range(50_000):
        if number % 500 == 0:
            (repository / f"d{number // 500}").mkdir()
        (repository / f"d{number // 500}/f{number}").write_bytes(b"content\n")
    blob = git(repository, "hash-object", "-w", "--stdin", stdin=b"content\n").decode().strip()
    lines = [f"100644 {blob}\td{n // 500}/f{n}\n" for n in range(50_000)]
    git(repository, "update-index", "--index-info", stdin="".join(lines).encode())
    git(repository, "commit", "-q", "-m", "many")
    program = (
        "import sys; from pathlib import Path\n"
        "from banger.workspace.inspect import inspect_repository\n"
        "from banger.workspace.options import ShipOptions\n"
        "from banger.workspace.pack import pack\n"
        "repository = inspect_repository(Path(sys.argv[1]))\n"
        "with open(sys.argv[2], 'wb') as out: r = pack(repository, ShipOptions(), out)\n"
        # Not ru_maxrss: that one begins with what our own process had when it forked.
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(r.file_count, next(l for l in status if l.startswith('VmHWM')).split()[1])\n"
    )
    archive = tmp_path / "a.tar"
    done = subprocess.run(
        [sys.executable, "-c", program, repository, archive],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    count, peak_kib = map(int, done.stdout.split())
    assert count == 50_000
    assert peak_kib < 160 * 1024
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, check=True).stdout
    assert listed.count(b"/f") == 50_000
