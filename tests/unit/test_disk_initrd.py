"""The initrd of one VM, and the archives in it, judged by cpio(1)."""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from banger.disk.cpio import (
    Writer,
    append_member,
    character_device,
    directory,
    read_members,
    regular_file,
)
from banger.disk.initrd import write_vm_initrd

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")


def write_base(path: Path, *, content: bytes = b"agent") -> Path:
    with path.open("wb") as f:
        writer = Writer(f)
        writer.add(directory("dev"))
        writer.add(character_device("dev/console", 5, 1))
        writer.add(regular_file("init", content, mode=0o755))
        writer.finish()
    return path


def list_with_cpio(archive: bytes) -> list[str]:
    done = subprocess.run(
        ["cpio", "-tv", "--quiet"], input=archive, capture_output=True, check=True
    )
    return done.stdout.decode().splitlines()


@needs_cpio
def test_cpio_reads_modes_devices_and_owners(tmp_path: Path) -> None:
    lines = list_with_cpio(write_base(tmp_path / "base").read_bytes())
    assert [line.split()[0] for line in lines] == ["drwxr-xr-x", "crw-------", "-rwxr-xr-x"]
    assert "5,   1" in lines[1]
    assert all(line.split()[2:4] == ["root", "root"] for line in lines)


@needs_cpio
@pytest.mark.parametrize("odd_bytes", range(4))
def test_cpio_finds_the_appended_archive_on_a_multiple_of_four(
    tmp_path: Path, odd_bytes: int
) -> None:
    base = write_base(tmp_path / "base")
    with base.open("ab") as f:
        f.write(bytes(odd_bytes))
    length = base.stat().st_size
    write_vm_initrd(base, tmp_path / "initrd", {"banger/config.json": b'{"schema":1}'})
    archive = (tmp_path / "initrd").read_bytes()
    start = length + -length % 4
    assert archive[:length] == base.read_bytes()
    (line,) = list_with_cpio(archive[start:])
    assert line.split()[0] == "-rw-------"
    assert line.endswith("banger/config.json")


@needs_cpio
def test_cpio_unpacks_what_was_appended(tmp_path: Path) -> None:
    stream = io.BytesIO()
    append_member(stream, "config.json", b"x" * 4099, mode=0o640)
    subprocess.run(["cpio", "-id", "--quiet"], input=stream.getvalue(), cwd=tmp_path, check=True)
    assert (tmp_path / "config.json").read_bytes() == b"x" * 4099
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o640


def test_the_initrd_is_readable_by_the_owner_alone(tmp_path: Path) -> None:
    target = tmp_path / "initrd.img"
    write_vm_initrd(write_base(tmp_path / "base"), target, {"banger/config.json": b"token"})
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_start_replaces_the_initrd_of_the_last_one(tmp_path: Path) -> None:
    base, target = write_base(tmp_path / "base"), tmp_path / "initrd.img"
    for token in (b"first, and longer", b"second"):
        write_vm_initrd(base, target, {"banger/config.json": token})
    with target.open("rb") as f:
        assert [m.content for m in read_members(f) if m.name.endswith("json")] == [b"second"]


def test_a_name_that_climbs_leaves_the_old_initrd_and_no_part_of_a_new_one(tmp_path: Path) -> None:
    base, target = write_base(tmp_path / "base"), tmp_path / "vm" / "initrd.img"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(ValueError, match="no name"):
        write_vm_initrd(base, target, {"../etc/shadow": b""})
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]
