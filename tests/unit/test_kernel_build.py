"""`kernel build`: from sources to an entry; the sources are small, make and the tools are real."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.kernel import build as kernel_build
from banger.kernel import build_tools
from banger.kernel.base_initrd import build_module_members
from banger.kernel.boot_modules import read_boot_modules
from banger.kernel.build import log_path, plan_build
from banger.kernel.entries import find_kernel, verify_kernel
from banger.units import TIB
from fakes.kernel_build import NAME, OPTIONS, RECIPE, Place
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


async def test_a_built_kernel_is_complete_and_needs_no_modules(
    place: Place, tmp_path: Path
) -> None:
    record = await place.build()
    assert (record.release, record.kernel_version) == ("6.12.9-banger", "6.12.9-1")
    assert (record.distro, record.arch) == ("debian", "amd64")
    assert record.source == "build:linux-source-6.12=6.12.9-1"
    files = {path.name: path for path in Path(record.directory).iterdir()}
    assert set(files) == {"vmlinux", "initrd.img", "modules.sqfs", "manifest.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o444}
    assert verify_kernel(place.paths, NAME) == ()
    # A guest's modprobe, and whoever pulls it as a bundle, finds all built in and nothing to load.
    members = read_boot_modules(files["modules.sqfs"], tmp_path, job=Job())
    assert members == build_module_members({})
    initrd = files["initrd.img"].read_bytes()
    assert b".ko\0" not in initrd
    assert b"banger/modules\0" in initrd
    # Without symbols, as it is loaded.
    symbols = subprocess.run(
        ["nm", str(files["vmlinux"])], capture_output=True, check=True, text=True
    )
    assert "nothing" not in symbols.stdout


async def test_progress_names_each_step(place: Place) -> None:
    await place.build()
    assert place.report.lines == [
        "looking for the newest linux-source-6.12",
        "downloading linux-source-6.12 6.12.9-1 (150 MB)",
        "unpacking linux-source-6.12 6.12.9-1",
        f"configuring {NAME} ({len(OPTIONS)} options)",
        f"compiling {NAME} ({len(os.sched_getaffinity(0))} at a time)",
        f"linking {NAME} (2 files compiled)",
    ]


async def test_nothing_of_host_user_and_day_gets_into_a_kernel(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTNAME_OF_MINE", "secret")
    monkeypatch.setenv("KBUILD_BUILD_USER", "ann")
    monkeypatch.setenv("LOCALVERSION", "-mine")
    first = await place.build()
    assert place.source.environment_in(Path(first.directory) / "vmlinux") == {
        "SOURCE_DATE_EPOCH": "1760000000",
        "KBUILD_BUILD_TIMESTAMP": "Thu Oct  9 08:53:20 UTC 2025",
        "KBUILD_BUILD_USER": "banger",
        "KBUILD_BUILD_HOST": "banger",
        "KBUILD_BUILD_VERSION": "1",
        "LOCALVERSION": "",
        "TZ": "UTC",
    }
    # In another directory, without the cache: the same bytes.
    second = await place.build(name="again")
    assert place.source.compiled == 2
    assert (second.sha256["vmlinux"], second.sha256["modules.sqfs"]) == (
        first.sha256["vmlinux"],
        first.sha256["modules.sqfs"],
    )


async def test_the_same_inputs_are_built_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.build()
    with pytest.raises(BangerError) as caught:
        await place.build()
    assert caught.value.code == "already_exists"
    await place.build("# more words, no options\n", force=True)
    assert place.source.compiled == 1
    place.version = "6.12.10-1"
    assert (await place.build(force=True)).kernel_version == "6.12.10-1"
    assert place.source.compiled == 2
    monkeypatch.setattr(kernel_build, "_compiler", lambda: ("gcc 99", "ld 99"))
    await place.build(force=True)
    assert place.source.compiled == 3


async def test_a_fragment_goes_on_top_of_the_kernels_own(place: Place) -> None:
    place.source.options |= {"BTRFS_FS"}
    fragment = '# what I need\nCONFIG_BTRFS_FS=y\nCONFIG_LOCALVERSION="-mine"\n'
    record = await place.build(fragment, name="mine")
    assert record.name == "mine"
    assert record.source.endswith("6.12.9-1, 2 options of a fragment on top")
    assert find_kernel(place.paths, NAME) is None


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        ("CONFIG_NO_SUCH_THING=y", "the sources have no option CONFIG_NO_SUCH_THING"),
        ("CONFIG_NEEDS_MORE=y", "CONFIG_NEEDS_MORE=y did not survive"),
        ("# CONFIG_EXT4_FS is not set", "it would lack CONFIG_EXT4_FS=y|m"),
        ("# CONFIG_NFT_MASQ is not set", "it would lack CONFIG_NFT_MASQ=y|m"),
    ],
)
async def test_an_option_that_does_not_survive_is_named(
    place: Place, fragment: str, words: str
) -> None:
    # It is defined, but make's allnoconfig leaves it out, as Kconfig does for a missing dependency.
    place.source.makefile = place.source.makefile.replace(
        "> .config", "| grep -v NEEDS_MORE > .config"
    )
    place.source.options |= {"NEEDS_MORE"}
    with pytest.raises(BangerError) as caught:
        await place.build(fragment)
    assert words in caught.value.message
    assert place.source.compiled == 0
    assert not find_kernel(place.paths, NAME)


async def test_a_failed_build_keeps_its_log_and_nothing_else(place: Place) -> None:
    place.source.say("fail")
    with pytest.raises(BangerError) as caught:
        await place.build()
    log = log_path(place.paths, NAME)
    assert "kernel/fork.c:7:1: error: expected ';'" in caught.value.message
    assert str(log) in caught.value.message
    assert caught.value.hint == f"less {log}"
    assert "  CC      init/main.o\n" in log.read_text()
    assert "error: expected" in log.read_text()
    assert place.left_behind() == [str(log.relative_to(place.paths.state.parent))]
    (place.source.steering / "fail").unlink()
    await place.build()
    assert not log.exists()


async def test_a_disk_that_fills_while_compiling_is_told_as_such(place: Place) -> None:
    place.source.say("full")
    with pytest.raises(BangerError) as caught:
        await place.build()
    assert caught.value.reason == "disk_full"
    assert "No space left on device" in caught.value.message


async def test_a_make_that_somebody_killed_is_told_as_such(place: Place) -> None:
    place.source.say("kill")
    with pytest.raises(BangerError, match="make vmlinux was killed by SIGKILL: no word of why"):
        await place.build()
    assert find_kernel(place.paths, NAME) is None


async def test_a_cancelled_build_stops_its_compilers_and_leaves_nothing(place: Place) -> None:
    place.source.say("hold")
    task = asyncio.create_task(place.build())
    async with asyncio.timeout(PATIENCE_S):
        while not (place.source.steering / "arrived").exists():
            await asyncio.sleep(0.01)
    assert processes_in(place.paths.build_cache)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # They were killed with their group; who has ended, and waits for init to take note, has none.
    async with asyncio.timeout(PATIENCE_S):
        while processes_in(place.paths.build_cache):
            await asyncio.sleep(0.01)
    assert place.left_behind() == []


def processes_in(directory: Path) -> list[int]:
    """Processes that work below a directory."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                where = os.readlink(path / "cwd")
            except OSError:
                continue
            if where.startswith(f"{directory}/"):
                found.append(int(path.name))
    return found


async def test_a_peer_that_builds_the_same_does_the_work_for_both(place: Place) -> None:
    first, second = await asyncio.gather(place.build(), place.build())
    assert first == second
    assert place.source.compiled == 1


async def test_what_is_missing_is_named_before_anything_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"flex", "bison"}
    real: Callable[..., Any] = build_tools.find_missing_tools
    monkeypatch.setattr(
        build_tools,
        "find_missing_tools",
        lambda tools: real(
            tools,
            find=lambda name: None if name in missing else f"/usr/bin/{name}",
            is_there=lambda path: path != "/usr/include/libelf.h",
        ),
    )
    with pytest.raises(BangerError) as caught:
        await place.build()
    assert caught.value.code == "not_found"
    assert "flex, bison, /usr/include/libelf.h" in caught.value.message
    assert caught.value.hint == "sudo apt-get install flex bison libelf-dev"
    assert place.report.lines == []


async def test_a_full_disk_is_refused_before_anything_is_fetched(place: Place) -> None:
    with pytest.raises(BangerError) as caught:
        await place.build(reserve_bytes=1024 * TIB)
    assert caught.value.reason == "disk_full"
    assert place.left_behind() == []


@pytest.mark.parametrize("jobs", [0, -1, 513])
async def test_a_number_of_jobs_must_make_sense(jobs: int) -> None:
    with pytest.raises(BangerError, match="must be 1 to 512"):
        plan_build(NAME, RECIPE, jobs=jobs)


async def test_sources_of_another_series_are_refused(place: Place) -> None:
    place.source.makefile = place.source.makefile.replace("PATCHLEVEL = 12", "PATCHLEVEL = 13")
    with pytest.raises(BangerError, match=r"holds Linux 6\.13\.9, not a 6\.12"):
        await place.build()
    assert place.left_behind() == []


async def test_a_kernel_whose_indexes_lack_what_boots_it_is_refused(place: Place) -> None:
    place.source.makefile = place.source.makefile.replace("@BOOT_MODULES@", "overlay")
    with pytest.raises(BangerError, match="no module failover, which a guest needs"):
        await place.build()
    assert find_kernel(place.paths, NAME) is None


async def test_a_package_without_sources_is_refused(place: Place, tmp_path: Path) -> None:
    package = tmp_path / "other.deb"
    package.write_bytes(b"!<arch>\n")
    place.source.write_package = lambda target: package  # type: ignore[method-assign]
    with pytest.raises(BangerError, match="no data.tar"):
        await place.build()
    assert place.left_behind() == []
