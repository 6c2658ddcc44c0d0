"""Images from build to delete; mmdebstrap and npm are the test's programs, sqfstar is real."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from banger.api.records import ImageRecord
from banger.config.paths import Paths
from banger.errors import BangerError
from banger.image import (
    build_image,
    check_image_files,
    delete_image,
    ensure_image,
    find_image,
    get_image,
    list_images,
    load_recipe,
    verify_image,
)
from banger.progress import Silent
from banger.units import TIB

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed"),
]

MMDEBSTRAP = """\
import io, os, sys, tarfile, time
place = os.path.dirname(os.path.realpath(__file__))
with open(place + "/calls", "a") as f:
    f.write("call\\n")
print("I: running apt-get update...", file=sys.stderr, flush=True)
while os.path.exists(place + "/hold"):
    time.sleep(0.01)
tar = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
for name in ("./", "./etc/", "./tmp/"):
    info = tarfile.TarInfo(name); info.type = tarfile.DIRTYPE; info.mode = 0o755
    tar.addfile(info)
for name in ("./etc/issue", "./tmp/left"):
    info = tarfile.TarInfo(name); info.size = 6; info.mtime = 1500000000
    tar.addfile(info, io.BytesIO(b"hello\\n"))
if os.path.exists(place + "/fail"):
    sys.stdout.buffer.flush()
    print("E: Unable to locate package mkae", file=sys.stderr)
    sys.exit(25)
tar.close()
"""
RECIPE = """
name = "small"
distro = "debian"
suite = "bookworm"
arch = ["amd64"]
from = "debootstrap"
kernel_ref = "debian-6.12-cloud"
packages = ["make"]
description = "for a test"

[[files]]
path = "/etc/motd"
content = "welcome"

[[downloads]]
name = "tool"
npm = "@x/tool"
version = "1.0"
sha512 = "{sha512}"
member = "package/tool"
path = "/usr/local/bin/tool"
optional = true
"""


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.labels: list[str] = []
        self.began = asyncio.Event()

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.labels.append(f"{label}: {detail}")
        if detail == "reading package lists":
            self.began.set()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class World:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(
            state=tmp_path / "state",
            cache=tmp_path / "cache",
            runtime=tmp_path / "run",
            config_file=tmp_path / "config.toml",
        )
        self.programs = tmp_path / "bin"
        self.programs.mkdir()
        self.write_program("mmdebstrap", f"#!{sys.executable}\n{MMDEBSTRAP}")
        self.write_program("apt-get", "#!/bin/sh\n")
        self.write_program("npm", "#!/bin/sh\necho 'npm error 404' >&2; exit 1\n")
        monkeypatch.setenv("PATH", f"{self.programs}:{os.environ['PATH']}")
        # Another user's build differs in one argument, and needs ids that this host may not have.
        monkeypatch.setattr("banger.image.debian.is_root", lambda: True)
        self.recipe = tmp_path / "small.toml"
        self.recipe.write_text(RECIPE.replace("{sha512}", "0" * 128))
        self.listener = Listener()

    def write_program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def switch(self, name: str, *, on: bool) -> None:
        if on:
            (self.programs / name).touch()
        else:
            (self.programs / name).unlink()

    @property
    def calls(self) -> int:
        log = self.programs / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    async def build(
        self, name: str = "small", *, refresh: bool = False, reserve_bytes: int = 0
    ) -> ImageRecord:
        return await build_image(
            self.paths,
            load_recipe(str(self.recipe)),
            name=name,
            reporter=self.listener,
            refresh=refresh,
            reserve_bytes=reserve_bytes,
        )

    def left_behind(self) -> list[str]:
        return [
            str(path)
            for root in (self.paths.images, self.paths.build_cache / "images" / "small")
            if root.exists()
            for path in root.iterdir()
            if not path.name.endswith("lock")
        ]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def test_a_built_image_holds_the_root_and_the_recipes_files(world: World) -> None:
    record = await world.build()
    listing = subprocess.run(
        ["unsquashfs", "-l", record.rootfs_path], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [line.removeprefix("squashfs-root") for line in listing] == [
        "", "/etc", "/etc/issue", "/etc/machine-id", "/etc/motd", "/tmp",
    ]  # fmt: skip


async def test_a_built_image_is_recorded_and_read_only(world: World) -> None:
    record = await world.build("web")
    assert record == get_image(world.paths, "web") == get_image(world.paths, record.id)
    assert (record.name, record.recipe, record.managed) == ("web", "small", True)
    assert record.kernel_ref == "debian-6.12-cloud"
    assert stat.S_IMODE(Path(record.rootfs_path).stat().st_mode) == 0o444
    assert record.rootfs_bytes == Path(record.rootfs_path).stat().st_size
    assert verify_image(world.paths, "web") == ()
    check_image_files(world.paths, record)


async def test_a_missing_optional_download_is_recorded_and_told(world: World) -> None:
    record = await world.build()
    assert record.optional_missing == ("tool",)
    assert any("tool" in warning and "404" in warning for warning in world.listener.warnings)


async def test_a_missing_download_that_is_not_optional_stops_the_build(world: World) -> None:
    world.recipe.write_text(world.recipe.read_text().replace("optional = true", ""))
    with pytest.raises(BangerError, match="tool"):
        await world.build()
    assert world.left_behind() == []


async def test_a_download_with_another_hash_stops_the_build_though_optional(world: World) -> None:
    world.write_program("npm", "#!/bin/sh\necho evil > tool.tgz\n")
    with pytest.raises(BangerError, match="sha512"):
        await world.build()
    assert world.left_behind() == []


async def test_the_same_recipe_is_built_once(world: World) -> None:
    one, two = await world.build("one"), await world.build("two")
    assert world.calls == 1
    assert Path(one.rootfs_path).stat().st_ino == Path(two.rootfs_path).stat().st_ino


async def test_refresh_builds_anew(world: World) -> None:
    await world.build("one")
    await world.build("two", refresh=True)
    assert world.calls == 2


async def test_a_changed_recipe_is_built_anew(world: World) -> None:
    await world.build("one")
    world.recipe.write_text(world.recipe.read_text().replace("welcome", "hello"))
    await world.build("two")
    assert world.calls == 2


async def test_two_builds_give_the_same_files_with_the_same_times(world: World) -> None:
    records = [await world.build("one"), await world.build("two", refresh=True)]
    listings = [
        subprocess.run(
            ["unsquashfs", "-lln", record.rootfs_path], capture_output=True, text=True, check=True
        ).stdout.splitlines()[1:]  # the root directory is first, with the time of the build
        for record in records
    ]
    assert listings[0] == listings[1]


async def test_a_name_in_use_is_refused(world: World) -> None:
    await world.build()
    with pytest.raises(BangerError) as caught:
        await world.build()
    assert caught.value.code == "already_exists"


async def test_two_builds_of_one_name_do_the_work_once_and_both_succeed(world: World) -> None:
    world.switch("hold", on=True)
    tasks = [asyncio.create_task(world.build()) for _ in range(3)]
    await asyncio.wait_for(world.listener.began.wait(), 10)
    world.switch("hold", on=False)
    records = await asyncio.gather(*tasks)
    assert world.calls == 1
    assert len({record.id for record in records}) == 1


async def test_a_failed_build_tells_mmdebstraps_words_and_leaves_nothing(world: World) -> None:
    world.switch("fail", on=True)
    with pytest.raises(BangerError, match="Unable to locate package mkae"):
        await world.build()
    assert world.left_behind() == []


async def test_a_cancelled_build_leaves_nothing(world: World) -> None:
    world.switch("hold", on=True)
    task = asyncio.create_task(world.build())
    await asyncio.wait_for(world.listener.began.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.left_behind() == []


async def test_a_build_that_would_fill_the_disk_starts_nothing(world: World) -> None:
    with pytest.raises(BangerError) as caught:
        await world.build(reserve_bytes=900 * TIB)
    assert caught.value.reason == "disk_full"
    assert world.calls == 0


async def test_ensure_takes_what_is_there(world: World) -> None:
    record = await world.build()
    assert await ensure_image(world.paths, "small", reporter=Silent()) == record


async def test_ensure_says_when_there_is_neither_image_nor_recipe(world: World) -> None:
    with pytest.raises(BangerError) as caught:
        await ensure_image(world.paths, "no-such", reporter=Silent())
    assert caught.value.code == "not_found"


async def test_a_damaged_image_stops_a_start_and_names_the_next_command(world: World) -> None:
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


async def test_a_damaged_image_is_not_brought_back_from_the_cache(world: World) -> None:
    record = await world.build()
    rootfs = Path(record.rootfs_path)
    rootfs.chmod(0o644)
    rootfs.write_bytes(bytes(record.rootfs_bytes))
    delete_image(world.paths, "small")
    await world.build()
    assert verify_image(world.paths, "small") == ()
    assert world.calls == 2


async def test_a_new_time_is_looked_into_once(world: World) -> None:
    record = await world.build()
    os.utime(record.rootfs_path)
    check_image_files(world.paths, record)
    rewritten = (Path(record.rootfs_path).parent / "manifest.json").stat()
    check_image_files(world.paths, record)
    again = (Path(record.rootfs_path).parent / "manifest.json").stat()
    assert rewritten.st_ino == again.st_ino


async def test_a_deleted_image_is_gone(world: World) -> None:
    record = await world.build()
    assert list_images(world.paths) == (record,)
    delete_image(world.paths, record.id)
    assert find_image(world.paths, "small") is None
    assert not Path(record.rootfs_path).exists()


async def test_an_entry_whose_manifest_cannot_be_read_is_an_error(world: World) -> None:
    record = await world.build()
    manifest = Path(record.rootfs_path).parent / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{}")
    with pytest.raises(BangerError, match=r"manifest\.json"):
        list_images(world.paths)
