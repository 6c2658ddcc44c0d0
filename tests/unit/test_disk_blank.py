"""Blank disks, judged by e2fsck and dumpe2fs."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from banger.config.paths import Paths
from banger.disk.blank import ensure_template, extend_disk, write_blank_disk
from banger.errors import BangerError
from banger.units import GIB, MIB

needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("dumpe2fs", path="/usr/sbin:/sbin:/usr/bin") is None,
    reason="dumpe2fs is not installed",
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        state=tmp_path / "state",
        cache=tmp_path / "cache",
        runtime=tmp_path / "run",
        config_file=tmp_path / "config.toml",
    )


def describe(disk: Path) -> dict[str, str]:
    done = subprocess.run(
        ["/usr/sbin/dumpe2fs", "-h", disk], capture_output=True, text=True, check=True
    )
    return dict(re.findall(r"^([^:\n]+):\s+(.*)$", done.stdout, re.MULTILINE))


@needs_e2fsprogs
@pytest.mark.parametrize("role", ["overlay", "work"])
def test_a_template_is_a_clean_filesystem_of_the_whole_size(paths: Paths, role: str) -> None:
    template = ensure_template(paths, role, 8 * GIB)  # type: ignore[arg-type] # literals
    subprocess.run(["/usr/sbin/e2fsck", "-fn", template], check=True, capture_output=True)
    facts = describe(template)
    assert int(facts["Block count"]) * int(facts["Block size"]) == 8 * GIB


@needs_e2fsprogs
def test_features_are_our_list_and_can_grow_while_mounted(paths: Paths) -> None:
    features = set(describe(ensure_template(paths, "work", GIB))["Filesystem features"].split())
    assert features == {
        "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit",
        "flex_bg", "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize",
        "metadata_csum",
    }  # fmt: skip


@needs_e2fsprogs
def test_the_guest_has_no_inode_tables_left_to_zero(paths: Paths) -> None:
    template = ensure_template(paths, "work", GIB)
    out = subprocess.run(
        ["/usr/sbin/dumpe2fs", template], capture_output=True, text=True, check=True
    ).stdout
    assert len(re.findall(r"^Group \d+:.*ITABLE_ZEROED", out, re.MULTILINE)) == len(
        re.findall(r"^Group \d+:", out, re.MULTILINE)
    )


@needs_e2fsprogs
def test_the_two_disks_of_a_guest_have_different_uuids(paths: Paths) -> None:
    uuids = {
        describe(ensure_template(paths, role, GIB))["Filesystem UUID"]
        for role in ("overlay", "work")
    }
    assert len(uuids) == 2


def test_a_template_is_sparse(paths: Paths) -> None:
    assert ensure_template(paths, "overlay", 8 * GIB).stat().st_blocks * 512 < 8 * MIB


def test_a_template_is_made_once(paths: Paths) -> None:
    first = ensure_template(paths, "overlay", GIB).stat()
    assert ensure_template(paths, "overlay", GIB).stat().st_ino == first.st_ino


def test_two_hosts_make_the_same_template(paths: Paths, tmp_path: Path) -> None:
    other = Paths(
        state=tmp_path / "other", cache=paths.cache, runtime=paths.runtime, config_file=tmp_path
    )
    blanks = [ensure_template(p, "overlay", 64 * MIB).read_bytes() for p in (paths, other)]
    assert blanks[0] == blanks[1]


def test_nothing_but_the_template_is_left_beside_it(paths: Paths) -> None:
    template = ensure_template(paths, "overlay", GIB)
    assert list(paths.templates.iterdir()) == [template]


@pytest.mark.parametrize("size", [0, 32 * MIB, GIB + 1, 129 * GIB, -GIB])
def test_a_size_that_no_disk_can_have_is_refused(paths: Paths, size: int) -> None:
    with pytest.raises(BangerError) as caught:
        ensure_template(paths, "work", size)
    assert caught.value.code == "bad_request"


def test_a_blank_disk_belongs_to_its_vm_alone(paths: Paths, tmp_path: Path) -> None:
    target = tmp_path / "overlay.ext4"
    write_blank_disk(paths, "overlay", GIB, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.stat().st_size == GIB
    assert target.stat().st_blocks * 512 < 64 * MIB


def test_a_disk_that_exists_is_not_written_over(paths: Paths, tmp_path: Path) -> None:
    target = tmp_path / "work.ext4"
    target.write_bytes(b"the user's data")
    with pytest.raises(BangerError):
        write_blank_disk(paths, "work", GIB, target)
    assert target.read_bytes() == b"the user's data"


def test_disks_grow(tmp_path: Path) -> None:
    disk = tmp_path / "work.ext4"
    disk.write_bytes(bytes(4096))
    extend_disk(disk, GIB)
    assert disk.stat().st_size == GIB


@pytest.mark.parametrize("size", [4096, GIB + 100, 200 * GIB])
def test_disks_neither_shrink_nor_grow_beyond_the_limit(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "work.ext4"
    disk.touch()
    extend_disk(disk, 8192)
    with pytest.raises(BangerError) as caught:
        extend_disk(disk, size)
    assert caught.value.code == "bad_request"
    assert disk.stat().st_size == 8192


def test_a_vm_has_little_of_its_own_before_it_writes(paths: Paths, tmp_path: Path) -> None:
    """Both disks together, on a filesystem that shares no blocks."""
    sizes = []
    for role in ("overlay", "work"):
        disk = tmp_path / role
        write_blank_disk(paths, role, 8 * GIB, disk)  # type: ignore[arg-type] # literals
        sizes.append(disk.stat().st_blocks * 512)
    assert sum(sizes) <= MIB, sizes


@needs_e2fsprogs
@pytest.mark.skipif(
    shutil.which("resize2fs", path="/usr/sbin:/sbin") is None, reason="no resize2fs"
)
def test_a_disk_can_grow_to_the_largest_size_without_moving_anything(
    paths: Paths, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    write_blank_disk(paths, "work", 256 * MIB, disk)
    extend_disk(disk, 128 * GIB)
    subprocess.run(["/usr/sbin/resize2fs", "-f", disk], check=True, capture_output=True)
    facts = describe(disk)
    assert int(facts["Block count"]) * int(facts["Block size"]) == 128 * GIB
    assert "meta_bg" not in facts["Filesystem features"]
    subprocess.run(["/usr/sbin/e2fsck", "-fn", disk], check=True, capture_output=True)
