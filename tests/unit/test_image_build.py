"""Images from build to delete; mmdebstrap and npm are the test's programs, sqfstar is real."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from banger.errors import BangerError
from banger.image import (
    build,
    check_image_files,
    delete_image,
    ensure_image,
    find_image,
    get_image,
    list_images,
    verify_image,
)
from banger.image.entries import find_damaged
from banger.progress import Silent
from banger.units import TIB
from fakes.building import BuildWorld
from patience import PATIENCE_S

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed"),
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildWorld:
    return BuildWorld(tmp_path, monkeypatch)


async def test_a_built_image_holds_the_root_and_the_recipes_files(world: BuildWorld) -> None:
    record = await world.build()
    listing = subprocess.run(
        ["unsquashfs", "-l", record.rootfs_path], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [line.removeprefix("squashfs-root") for line in listing] == [
        "", "/etc", "/etc/issue", "/etc/machine-id", "/etc/motd", "/tmp",
    ]  # fmt: skip


async def test_a_built_image_is_recorded_and_read_only(world: BuildWorld) -> None:
    record = await world.build("web")
    assert record == get_image(world.paths, "web") == get_image(world.paths, record.id)
    assert (record.name, record.recipe, record.managed) == ("web", "small", True)
    assert record.kernel_ref == "debian-6.12-cloud"
    assert stat.S_IMODE(Path(record.rootfs_path).stat().st_mode) == 0o444
    assert record.rootfs_bytes == Path(record.rootfs_path).stat().st_size
    assert verify_image(world.paths, "web") == ()
    check_image_files(world.paths, record)


async def test_a_missing_optional_download_is_recorded_and_told(world: BuildWorld) -> None:
    record = await world.build()
    assert record.optional_missing == ("tool",)
    assert any("tool" in warning and "404" in warning for warning in world.listener.warnings)


async def test_a_missing_download_that_is_not_optional_stops_the_build(world: BuildWorld) -> None:
    world.recipe.write_text(world.recipe.read_text().replace("optional = true", ""))
    with pytest.raises(BangerError, match="tool"):
        await world.build()
    assert world.left_behind() == []


async def test_a_download_with_another_hash_stops_the_build_though_optional(
    world: BuildWorld,
) -> None:
    world.write_program("npm", "#!/bin/sh\necho evil > tool.tgz\n")
    with pytest.raises(BangerError, match="sha512"):
        await world.build()
    assert world.left_behind() == []


async def test_the_same_recipe_is_built_once(world: BuildWorld) -> None:
    one, two = await world.build("one"), await world.build("two")
    assert world.calls == 1
    assert Path(one.rootfs_path).stat().st_ino == Path(two.rootfs_path).stat().st_ino


async def test_refresh_builds_anew(world: BuildWorld) -> None:
    await world.build("one")
    await world.build("two", refresh=True)
    assert world.calls == 2


async def test_a_changed_recipe_is_built_anew(world: BuildWorld) -> None:
    await world.build("one")
    world.recipe.write_text(world.recipe.read_text().replace("welcome", "hello"))
    await world.build("two")
    assert world.calls == 2


async def test_two_builds_give_the_same_files_with_the_same_times(world: BuildWorld) -> None:
    records = [await world.build("one"), await world.build("two", refresh=True)]
    listings = [
        subprocess.run(
            ["unsquashfs", "-lln", record.rootfs_path], capture_output=True, text=True, check=True
        ).stdout.splitlines()[1:]  # the root directory is first, with the time of the build
        for record in records
    ]
    assert listings[0] == listings[1]


async def test_a_name_in_use_is_refused(world: BuildWorld) -> None:
    await world.build()
    with pytest.raises(BangerError) as caught:
        await world.build()
    assert caught.value.code == "already_exists"


async def test_two_builds_of_one_name_do_the_work_once_and_both_succeed(world: BuildWorld) -> None:
    world.switch("hold", on=True)
    tasks = [asyncio.create_task(world.build()) for _ in range(3)]
    await asyncio.wait_for(world.listener.began.wait(), PATIENCE_S)
    world.switch("hold", on=False)
    records = await asyncio.gather(*tasks)
    assert world.calls == 1
    assert len({record.id for record in records}) == 1


async def test_a_failed_build_tells_mmdebstraps_words_and_leaves_nothing(world: BuildWorld) -> None:
    world.switch("fail", on=True)
    with pytest.raises(BangerError, match="Unable to locate package mkae"):
        await world.build()
    assert world.left_behind() == []


async def test_a_cancelled_build_leaves_nothing(world: BuildWorld) -> None:
    world.switch("hold", on=True)
    task = asyncio.create_task(world.build())
    await asyncio.wait_for(world.listener.began.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.left_behind() == []


async def test_a_build_that_would_fill_the_disk_starts_nothing(world: BuildWorld) -> None:
    with pytest.raises(BangerError) as caught:
        await world.build(reserve_bytes=900 * TIB)
    assert caught.value.reason == "disk_full"
    assert world.calls == 0


async def test_an_image_that_is_built_by_force_stays_until_there_is_another(
    world: BuildWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the other one does not fit on the disk."""
    first = await world.build()

    def full(*_: Any, **__: Any) -> None:
        raise BangerError("operation_failed", "no room", reason="disk_full")

    with monkeypatch.context() as patch:
        patch.setattr(build, "require_space", full)
        with pytest.raises(BangerError, match="no room"):
            await world.build_by_force()
    assert list_images(world.paths) == (first,)
    second = await world.build_by_force()
    assert second.id != first.id
    assert list_images(world.paths) == (second,)


async def test_an_image_that_got_a_vm_meanwhile_is_not_replaced(world: BuildWorld) -> None:
    first = await world.build()
    world.switch("hold", on=True)
    world.recipe.write_text(world.recipe.read_text() + "# another one\n")
    building = asyncio.create_task(world.build_by_force())
    await asyncio.wait_for(world.listener.began.wait(), PATIENCE_S)
    world.vms = [SimpleNamespace(name="web", image_id=first.id)]
    world.switch("hold", on=False)
    with pytest.raises(BangerError, match="used by web"):
        await building
    assert list_images(world.paths) == (first,)


async def test_ensure_takes_what_is_there(world: BuildWorld) -> None:
    record = await world.build()
    assert await ensure_image(world.paths, "small", reporter=Silent()) == record


async def test_ensure_says_when_there_is_neither_image_nor_recipe(world: BuildWorld) -> None:
    with pytest.raises(BangerError) as caught:
        await ensure_image(world.paths, "no-such", reporter=Silent())
    assert caught.value.code == "not_found"


async def test_a_damaged_image_stops_a_start_and_names_the_next_command(world: BuildWorld) -> None:
    record = await world.build()
    rootfs = Path(record.rootfs_path)
    rootfs.chmod(0o644)
    content = bytearray(rootfs.read_bytes())
    content[100] ^= 1
    rootfs.write_bytes(content)
    with pytest.raises(BangerError) as caught:
        check_image_files(world.paths, record)
    assert caught.value.reason == "files_changed"
    assert caught.value.hint == "banger image verify small"
    assert "sha256" in verify_image(world.paths, "small")[0]


async def test_a_damaged_image_is_not_brought_back_from_the_cache(world: BuildWorld) -> None:
    record = await world.build()
    rootfs = Path(record.rootfs_path)
    rootfs.chmod(0o644)
    rootfs.write_bytes(bytes(record.rootfs_bytes))
    delete_image(world.paths, "small")
    await world.build()
    assert verify_image(world.paths, "small") == ()
    assert world.calls == 2


async def test_a_new_time_is_looked_into_once(world: BuildWorld) -> None:
    record = await world.build()
    os.utime(record.rootfs_path)
    check_image_files(world.paths, record)
    rewritten = (Path(record.rootfs_path).parent / "manifest.json").stat()
    check_image_files(world.paths, record)
    again = (Path(record.rootfs_path).parent / "manifest.json").stat()
    assert rewritten.st_ino == again.st_ino


async def test_a_deleted_image_is_gone(world: BuildWorld) -> None:
    record = await world.build()
    assert list_images(world.paths) == (record,)
    delete_image(world.paths, record.id)
    assert find_image(world.paths, "small") is None
    assert not Path(record.rootfs_path).exists()


async def test_an_image_whose_manifest_cannot_be_read_is_told_and_stands_in_nobodys_way(
    world: BuildWorld,
) -> None:
    """Else no VM of any image could be made, and no image deleted."""
    record = await world.build("small")
    other = await world.build("other")
    manifest = Path(record.rootfs_path).parent / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{}")
    assert list_images(world.paths) == (other,)
    assert find_image(world.paths, "small") is None
    for ask in (
        lambda: find_image(world.paths, record.id),
        lambda: get_image(world.paths, record.id),
    ):
        with pytest.raises(BangerError, match=r"reading the image manifest .*manifest\.json"):
            ask()
    with pytest.raises(BangerError, match="1 here cannot be read, see: banger doctor"):
        get_image(world.paths, "small")
    assert [str(manifest) in str(e) for e in find_damaged(world.paths)] == [True]
    delete_image(world.paths, "other")
    assert (await world.build("small")).id != record.id
