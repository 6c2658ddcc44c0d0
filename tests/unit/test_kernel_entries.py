"""Kernel entries from pull to delete; apt and the package's content are the test's."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from banger.disk.cpio import read_members
from banger.errors import BangerError
from banger.kernel import (
    check_kernel_files,
    delete_kernel,
    ensure_base_initrd,
    find_kernel,
    get_kernel,
    list_kernels,
    pull_kernel,
    verify_kernel,
)
from banger.progress import Silent
from banger.units import TIB
from fakes.kernel_pull import NAME, KernelWorld
from patience import PATIENCE_S


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelWorld:
    return KernelWorld(tmp_path, monkeypatch)


@pytest.mark.asyncio
async def test_a_pulled_kernel_is_complete_and_read_only(world: KernelWorld) -> None:
    record = await world.pull()
    assert record == get_kernel(world.paths, NAME)
    assert (record.release, record.kernel_version) == ("6.12.1-cloud", "6.12.1-1")
    assert record.source == "apt:linux=6.12.1-1"
    files = {path.name: path.stat() for path in Path(record.directory).iterdir()}
    assert set(files) == {"vmlinux", "initrd.img", "modules.sqfs", "manifest.json"}
    assert {stat.S_IMODE(st.st_mode) for st in files.values()} == {0o444}
    check_kernel_files(record)
    assert verify_kernel(world.paths, NAME) == ()


@pytest.mark.asyncio
async def test_a_kernel_that_is_here_is_pulled_again_only_by_force(world: KernelWorld) -> None:
    await world.pull()
    with pytest.raises(BangerError) as caught:
        await world.pull()
    assert caught.value.code == "already_exists"
    world.version = "6.12.2-1"
    assert (await world.pull(force=True)).kernel_version == "6.12.2-1"
    assert len(world.left_behind()) == 2


@pytest.mark.asyncio
async def test_the_same_package_is_downloaded_once(world: KernelWorld) -> None:
    await world.pull()
    delete_kernel(world.paths, NAME)
    await world.pull()
    assert world.downloads == 1


@pytest.mark.asyncio
async def test_two_pulls_at_once_do_the_work_once_and_both_succeed(world: KernelWorld) -> None:
    world.hold.clear()
    tasks = [asyncio.create_task(world.pull()) for _ in range(3)]
    await asyncio.to_thread(world.arrived.wait, PATIENCE_S)
    world.hold.set()
    records = await asyncio.gather(*tasks)
    assert world.downloads == 1
    assert len({record.imported_at for record in records}) == 1


@pytest.mark.asyncio
async def test_a_cancelled_pull_leaves_nothing(world: KernelWorld) -> None:
    world.hold.clear()
    task = asyncio.create_task(world.pull())
    await asyncio.to_thread(world.arrived.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.left_behind() == []


@pytest.mark.asyncio
async def test_a_peer_behind_a_cancelled_pull_does_the_work_itself(world: KernelWorld) -> None:
    world.hold.clear()
    first = asyncio.create_task(world.pull())
    await asyncio.to_thread(world.arrived.wait, PATIENCE_S)
    second = asyncio.create_task(world.pull())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    world.hold.set()
    assert (await second).name == NAME


@pytest.mark.asyncio
async def test_a_failed_pull_leaves_nothing(world: KernelWorld) -> None:
    world.fail = BangerError("operation_failed", "the package is damaged")
    with pytest.raises(BangerError, match="damaged"):
        await world.pull()
    assert world.left_behind() == []


@pytest.mark.asyncio
async def test_a_pull_that_would_fill_the_disk_downloads_nothing(world: KernelWorld) -> None:
    with pytest.raises(BangerError) as caught:
        await world.pull(reserve_bytes=900 * TIB)
    assert caught.value.reason == "disk_full"
    assert world.downloads == 0


@pytest.mark.asyncio
async def test_an_unknown_name_is_not_found(world: KernelWorld) -> None:
    with pytest.raises(BangerError) as caught:
        await pull_kernel(world.paths, "no-such", reporter=Silent())
    assert caught.value.code == "not_found"
    assert caught.value.hint == "banger kernel list --available"


@pytest.mark.asyncio
async def test_another_agent_is_put_into_the_base_initrd(world: KernelWorld) -> None:
    before = await world.pull()
    world.agent.write_bytes(b"agent 2")
    after = ensure_base_initrd(world.paths, before)
    with Path(after.initrd).open("rb") as f:
        contents = {member.name: member.content for member in read_members(f)}
    assert contents["init"] == b"agent 2"
    assert contents["banger/ko/a.ko"] == b"A"
    assert after.agent_version != before.agent_version
    assert after == get_kernel(world.paths, NAME)
    check_kernel_files(after)


@pytest.mark.asyncio
async def test_the_same_agent_leaves_the_base_initrd_alone(world: KernelWorld) -> None:
    record = await world.pull()
    before = Path(record.initrd).stat().st_ino
    assert ensure_base_initrd(world.paths, record) == record
    assert Path(record.initrd).stat().st_ino == before


@pytest.mark.asyncio
async def test_a_changed_file_stops_a_start_and_is_named(world: KernelWorld) -> None:
    record = await world.pull()
    modules = Path(record.modules)
    modules.chmod(0o644)
    modules.write_text("MODULES")
    with pytest.raises(BangerError) as caught:
        check_kernel_files(record)
    assert caught.value.reason == "files_changed"
    assert "modules.sqfs" in caught.value.message
    assert len(verify_kernel(world.paths, NAME)) == 1


@pytest.mark.asyncio
async def test_a_copied_state_directory_with_new_times_still_starts(world: KernelWorld) -> None:
    record = await world.pull()
    os.utime(record.modules)
    check_kernel_files(record)


@pytest.mark.asyncio
async def test_a_deleted_kernel_is_gone(world: KernelWorld) -> None:
    await world.pull()
    assert [record.name for record in list_kernels(world.paths)] == [NAME]
    delete_kernel(world.paths, NAME)
    assert find_kernel(world.paths, NAME) is None
    assert list_kernels(world.paths) == ()


def test_a_missing_kernel_is_not_found_with_the_way_to_it(world: KernelWorld) -> None:
    for action in (get_kernel, delete_kernel):
        with pytest.raises(BangerError) as caught:
            action(world.paths, NAME)
        assert caught.value.hint == f"banger kernel pull {NAME}"


@pytest.mark.asyncio
async def test_a_manifest_that_cannot_be_read_is_an_error_not_an_absence(
    world: KernelWorld,
) -> None:
    record = await world.pull()
    manifest = Path(record.directory) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{")
    with pytest.raises(BangerError, match=r"manifest\.json"):
        find_kernel(world.paths, NAME)


@pytest.mark.parametrize("name", ["../images", ".lock", "", "a/b"])
def test_a_name_that_climbs_is_refused(world: KernelWorld, name: str) -> None:
    with pytest.raises(BangerError) as caught:
        find_kernel(world.paths, name)
    assert caught.value.code == "bad_request"
