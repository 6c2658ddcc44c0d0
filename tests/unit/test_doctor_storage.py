"""Doctor's checks of what banger keeps: database, directories, room, memory, caches, settings."""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
import subprocess
from pathlib import Path

import msgspec
import pytest

from banger.config.file_sync import FileSync
from banger.config.settings import Settings, VmDefaults
from banger.config.system_paths import SystemPaths
from banger.doctor import storage
from banger.doctor.configuration import find_sources
from banger.store.database import open_database
from banger.store.look import look_at_database
from banger.store.vms import VmStore
from banger.units import GIB
from fakes.doctor import FakeWorld, database, running, vm


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    world = FakeWorld(tmp_path)
    for path in (world.paths.state, world.paths.cache, world.paths.runtime):
        path.mkdir(parents=True)
        path.chmod(0o700)
    return world


def real(world: FakeWorld) -> FakeWorld:
    """The same world with its real database."""
    del world.known["store"]
    return world


# Database


def test_a_database_that_can_be_read_passes(world: FakeWorld) -> None:
    store = VmStore(open_database(world.paths.database))
    store.reserve("web", None, frozenset(), lambda name, _: vm(name))
    try:
        row = real(world).row("store")
    finally:
        store.close()
    assert (row.level, row.message) == ("PASS", "the database can be read: 1 VM")
    assert [v.name for v in world.vms] == ["web"]


def test_no_database_is_made_by_looking(world: FakeWorld) -> None:
    assert real(world).row("store").level == "PASS"
    assert not world.paths.database.exists()


def test_looking_migrates_nothing(world: FakeWorld) -> None:
    with sqlite3.connect(world.paths.database) as connection:
        connection.execute("CREATE TABLE somebody (x)")
    connection.close()
    before = world.paths.database.read_bytes()
    assert "the next daemon brings it to" in real(world).row("store").message
    assert world.paths.database.read_bytes() == before


def test_a_newer_database_fails(world: FakeWorld) -> None:
    with sqlite3.connect(world.paths.database) as connection:
        connection.execute("PRAGMA user_version = 9999")
    connection.close()
    assert real(world).row("store").level == "FAIL"
    assert not world.rows_are_known


def test_a_file_that_is_no_database_fails(world: FakeWorld) -> None:
    world.paths.database.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    row = real(world).row("store")
    assert (row.level, row.command) == ("FAIL", f"ls -l {world.paths.database}*")
    assert not world.rows_are_known


def test_a_damaged_database_can_be_put_aside(world: FakeWorld) -> None:
    world.known["store"] = database(problems=("page 3 is lost",), vms=None)
    world.paths.database.write_bytes(b"damaged")
    row = world.row("store")
    assert row.level == "FAIL"
    assert row.command is not None
    subprocess.run(shlex.split(row.command), check=True)
    assert look_at_database(world.paths.database) is None


# Directories


def test_directories_of_the_right_mode_pass(world: FakeWorld) -> None:
    mounts = "1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 8:2 / {} rw - btrfs /dev/y rw\n"
    world.have("/proc/self/mountinfo", mounts.format(os.path.realpath(world.paths.state)))
    row = world.row("directories")
    assert row.level == "PASS"
    assert row.details[0].startswith(f"state {world.paths.state} on btrfs, with")
    assert row.details[1] == f"cache {world.paths.cache} on ext4"
    # What was tried is gone again.
    assert list(world.paths.state.iterdir()) == []


def test_directories_that_are_open_to_others_are_mended_by_fix(world: FakeWorld) -> None:
    world.paths.state.chmod(0o755)
    # Downloads are no secret: only writing them is.
    world.paths.cache.chmod(0o755)
    bad, _ = world.look("directories")
    assert (bad.level, bad.fixable) == ("FAIL", True)
    assert bad.command == f"chmod 700 {world.paths.state}"
    assert world.fix("directories") == [
        f"changed the mode of {world.paths.state} from 0755 to 0700"
    ]
    assert stat.S_IMODE(world.paths.cache.stat().st_mode) == 0o755
    assert world.row("directories").level == "PASS"


def test_missing_directories_are_made_by_fix(world: FakeWorld) -> None:
    world.paths.runtime.rmdir()
    missing, _ = world.look("directories")
    assert (missing.level, missing.fixable) == ("WARN", True)
    assert world.fix("directories") == [f"made {world.paths.runtime} (mode 0700)"]
    assert world.row("directories").level == "PASS"


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path, uid=os.geteuid() + 1)
    for path in (world.paths.state, world.paths.cache, world.paths.runtime):
        path.mkdir(parents=True)
        path.chmod(0o755)
    rows = world.look("directories")
    assert [row.level for row in rows] == ["FAIL"] * 3
    assert not any(row.fixable for row in rows)
    assert world.fix("directories") == []


def test_a_link_in_place_of_a_directory_fails(world: FakeWorld, tmp_path: Path) -> None:
    world.paths.runtime.rmdir()
    world.paths.runtime.symlink_to(tmp_path)
    assert any(row.level == "FAIL" for row in world.look("directories"))
    assert world.fix("directories") == []


def test_jails_on_a_filesystem_without_devices_fail(world: FakeWorld, tmp_path: Path) -> None:
    system = SystemPaths(root=tmp_path / "sys")
    world.paths = msgspec.structs.replace(world.paths, mode="system", system=system)
    system.jails.mkdir(parents=True)
    mounts = "1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 8:2 / {} rw,nosuid,nodev - ext4 /dev/y rw\n"
    world.have("/proc/self/mountinfo", mounts.format(os.path.realpath(system.jails)))
    (row,) = [row for row in world.look("directories") if row.level == "FAIL"]
    assert "nodev" in row.message


# Room


def test_enough_free_disk_passes_with_both_sums(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = vm()
    world.set_vms(web)
    world.paths.vm(web.id).directory.mkdir(parents=True)
    world.paths.vm(web.id).overlay.write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(storage, "free_bytes", lambda _: 100 * GIB)
    row = world.row("disk space")
    assert row.level == "PASS"
    assert row.details == ("disks of 1 VM: 1G promised, 1M written",)


@pytest.mark.parametrize(("free", "level"), [(1 * GIB, "FAIL"), (3 * GIB, "WARN")])
def test_too_little_free_disk(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda _: free)
    row = world.row("disk space")
    assert (row.level, row.command) == (level, "banger vm prune")


def test_promises_beyond_the_disk_are_said(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.set_vms(vm(overlay_bytes=500 * GIB))
    monkeypatch.setattr(storage, "free_bytes", lambda _: 100 * GIB)
    row = world.row("disk space")
    assert row.level == "PASS"
    assert "VMs that fill their disks will meet a full host disk" in row.details


def test_memory(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "host_memory_mib", lambda: 16384)
    world.set_vms(vm(memory_mib=1024))
    row = world.row("memory")
    assert row.level == "PASS"
    assert "running VMs have 1088 MiB" in row.message
    world.set_vms(vm(memory_mib=1024), vm("big", 3, memory_mib=14000))
    row = world.row("memory")
    assert (row.level, row.command) == ("WARN", "banger vm stop big")


def test_a_budget_that_holds_no_default_vm_fails(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "host_memory_mib", lambda: 16384)
    world.set_settings(vm_defaults=VmDefaults(memory_mib=15000))
    row = world.row("memory")
    assert (row.level, row.command) == ("FAIL", f"$EDITOR {world.paths.config_file}")


def test_an_image_that_cannot_be_read_is_told(world: FakeWorld) -> None:
    damaged = world.paths.images / ("d" * 32)
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text('{"schema": 2}')
    rows = world.look("cache")
    assert [row.level for row in rows] == ["PASS", "FAIL"]
    assert str(damaged) in rows[1].message


def test_caches_are_counted_by_kind_and_links_once(world: FakeWorld) -> None:
    image = world.paths.images / "a" / "rootfs.sqfs"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x" * (2 << 20))
    (image.parent / "again").hardlink_to(image)
    blob = world.paths.cache / "oci" / "blob"
    blob.parent.mkdir()
    blob.write_bytes(b"x" * (1 << 20))
    row = world.row("cache")
    assert row.details == ("images: 2M", "cache of oci: 1M, at most 10G of layers")
    assert row.message.startswith("3M in ")


# Configuration


def test_a_configuration_that_can_be_read_passes(world: FakeWorld) -> None:
    world.paths.config_file.parent.mkdir(parents=True)
    world.paths.config_file.write_text("cidr = 25\n")
    del world.known["configuration"]
    row = world.row("config")
    assert row.level == "PASS"
    assert str(world.paths.config_file) in row.message
    assert world.settings.cidr == 25


def test_an_unknown_key_fails_with_the_nearest(world: FakeWorld) -> None:
    world.paths.config_file.parent.mkdir(parents=True)
    world.paths.config_file.write_text("bridge_nam = 'br-fc'\n")
    del world.known["configuration"]
    row = world.row("config")
    assert (row.level, row.command) == ("FAIL", f"$EDITOR {world.paths.config_file}")
    assert "bridge_name" in row.message
    # Everything else is looked at with the defaults.
    assert world.settings == Settings()


def test_a_daemon_that_read_another_configuration_is_a_warning(world: FakeWorld) -> None:
    world.known["daemon"] = running()
    assert world.row("config").level == "PASS"
    world.set_settings(cidr=25)
    row = world.row("config")
    assert (row.level, row.command) == ("WARN", "banger daemon stop")
    world.paths = msgspec.structs.replace(world.paths, mode="system")
    assert world.row("config").command == "sudo banger system restart"


def test_defaults_are_shown_with_their_sources(world: FakeWorld) -> None:
    world.set_settings(vm_defaults=VmDefaults(vcpu=1))
    row = world.row("vm defaults")
    assert row.details[0] == "vcpu = 1 (config)"
    assert row.details[2] == "disk_size = 8G (auto)"
    assert str(world.paths.config_file) in row.details[-1]


@pytest.mark.parametrize(
    ("cpus", "memory_mib", "vcpu", "memory"),
    [(16, 32768, "auto", "auto"), (4, 8192, "builtin", "builtin"), (8, 16384, "auto", "auto")],
)
def test_a_small_host_gets_the_built_in_floor(
    cpus: int, memory_mib: int, vcpu: str, memory: str
) -> None:
    sources = find_sources(VmDefaults(), host_cpus=cpus, host_memory_mib=memory_mib)
    assert (sources["vcpu"], sources["memory_mib"]) == (vcpu, memory)


def test_files_of_the_home_are_a_warning_when_they_are_not_there(
    world: FakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert world.row("file_sync").level == "PASS"
    (tmp_path / "token").write_text("x" * 100)
    world.set_settings(file_sync=(FileSync(host="~/token", guest="~/token"),))
    row = world.row("file_sync")
    assert (row.level, row.message) == ("PASS", "1 entry: 1 file, 100B")
    world.set_settings(file_sync=(FileSync(host="~/gone", guest="~/token"),))
    row = world.row("file_sync")
    assert (row.level, row.details) == (
        "WARN", ("file_sync: ~/gone does not exist and is skipped",),
    )  # fmt: skip
    (tmp_path / "gone").symlink_to("/etc/passwd")
    assert world.row("file_sync").level == "FAIL"
