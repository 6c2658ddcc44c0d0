"""A full disk is told as one at every edge, with what to type; what looks like one is not."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.cli import version_command
from banger.daemon import main as daemon_main
from banger.disk.blank import ensure_template
from banger.errors import BangerError, explain_disk_full, find_disk_full
from banger.process import ProcessFailed
from banger.units import MIB
from fakes.command_line import CommandLine
from fakes.world import World

FULL = OSError(errno.ENOSPC, "No space left on device", "/state/x")


def caused(e: BaseException, cause: BaseException) -> BaseException:
    e.__cause__ = cause
    return e


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, "vm.create: the host's disk is full (/state/x)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "vm.create: the host's disk is full"),
        (
            caused(BangerError("operation_failed", "writing x"), FULL),
            "writing x: the host's disk is full",
        ),
        (
            caused(BangerError("operation_failed", "writing x: No space left on device"), FULL),
            "writing x: No space left on device",
        ),
        (
            caused(RuntimeError("x"), caused(BangerError("operation_failed", "y"), FULL)),
            "vm.create: the host's disk is full",
        ),
        (
            caused(
                BangerError("operation_failed", "writing rootfs.sqfs"),
                ProcessFailed(["sqfstar"], 1, b"FATAL ERROR: ... No space left on device\n"),
            ),
            "writing rootfs.sqfs: the host's disk is full",
        ),
    ],
)
def test_a_full_disk_is_told(error: BaseException, message: str) -> None:
    told = find_disk_full(error, doing="vm.create")
    assert told is not None
    assert (told.message, told.code, told.reason) == (message, "operation_failed", "disk_full")
    assert "banger" in (told.hint or "")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        # A guest's words about its own disk are no matter of the host's.
        BangerError("operation_failed", "in the guest: No space left on device"),
        ProcessFailed(["mke2fs"], 1, b"bad magic number"),
    ],
)
def test_anything_else_stays_what_it_is(error: Exception) -> None:
    assert find_disk_full(error) is None
    assert explain_disk_full(error) is error


def test_a_reason_of_its_own_is_kept() -> None:
    error = caused(BangerError("operation_failed", "x", reason="guest_not_ready"), FULL)
    assert find_disk_full(error) is error


# --- the command line, and the daemon that does not come up ---------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_says_it(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def write(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(version_command.version, "callback", write)
    done = cli("version", *(["--json"] if as_json else []))
    assert done.status == 1
    if as_json:
        error = msgspec.json.decode(done.out)["error"]
        assert (error["code"], error["reason"]) == ("operation_failed", "disk_full")
    else:
        assert "the host's disk is full (/state/x)\nhint: df -h" in done.err
        assert "Traceback" not in done.err


def test_another_os_error_is_not_hidden(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(version_command.version, "callback", write)
    with pytest.raises(OSError, match="Input/output"):
        cli("version")


def test_a_daemon_that_finds_no_room_says_so_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bangerd"])
    umask = os.umask(0o077)

    def run(_: object) -> None:
        raise FULL

    monkeypatch.setattr(daemon_main, "_run", run)
    try:
        with pytest.raises(SystemExit) as ended:
            daemon_main.main()
    finally:
        os.umask(umask)
    assert ended.value.code == 1
    assert (
        "bangerd: starting: the host's disk is full (/state/x)\nhint: " in capsys.readouterr().err
    )


# --- admission ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_start_asks_for_what_it_writes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create(start=False)
    initrd = (world.paths.kernels / "fake-kernel" / "initrd.img").stat().st_size
    free: dict[str, int] = {}
    monkeypatch.setattr("banger.disk.space.free_bytes", lambda _: free["bytes"])
    reserve = world.settings.disk_reserve_bytes

    # Room for the reserve and an initrd, not for two blank disks.
    free["bytes"] = reserve + initrd + MIB
    before = world.census()
    with pytest.raises(BangerError, match=r"starting VM web: it needs about") as caught:
        await world.start(vm)
    assert (caught.value.reason, "disk_reserve" in caught.value.message) == ("disk_full", True)
    assert world.census() == before

    free["bytes"] = reserve + initrd + 20 * MIB
    await world.start(vm)
    from banger.vm.stop import stop

    await stop(world.ctx, vm)
    # Its disks are there by now.
    free["bytes"] = reserve + initrd
    await world.start(vm)
    await stop(world.ctx, vm)
    free["bytes"] -= 1
    with pytest.raises(BangerError):
        await world.start(vm)


@pytest.mark.asyncio
async def test_a_create_below_the_reserve_makes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.disk.space.free_bytes", lambda _: MIB - 1)
    before = world.census()
    with pytest.raises(BangerError, match="creating a VM") as caught:
        await world.create()
    assert caught.value.reason == "disk_full"
    assert world.census() == before


def test_two_makers_of_one_template_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mke2fs goes by its defaults, without a word, when its configuration is gone."""
    from banger.config.paths import Paths
    from banger.disk import blank

    paths = Paths(state=tmp_path, cache=tmp_path, runtime=tmp_path, config_file=tmp_path)
    real: Callable[..., Any] = blank.run

    def run(argv: list[str], **options: Any) -> Any:
        monkeypatch.setattr(blank, "run", real)
        # Another one comes and goes while this one is about to begin.
        template = ensure_template(paths, "work", 64 * MIB)
        template.unlink()
        assert Path(options["env"]["MKE2FS_CONFIG"]).exists()
        return real(argv, **options)

    monkeypatch.setattr(blank, "run", run)
    assert ensure_template(paths, "work", 64 * MIB).exists()
