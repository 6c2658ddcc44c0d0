"""What both drivers share: waiting with the exit in view, deep paths, one protocol."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.vmm.driver import (
    Driver,
    before_exit,
    connected,
    remove_stale_sockets,
    wait_for_socket,
)
from banger.vmm.firecracker import FirecrackerDriver
from banger.vmm.qemu import QemuDriver
from fakes.vmm import USER, listening, make_machine
from patience import PATIENCE_S

FIRECRACKER = FirecrackerDriver(program=Path("/opt/firecracker"), version="1.12.1")
QEMU = QemuDriver(
    program=Path("/usr/bin/qemu-system-x86_64"),
    version="7.2.0",
    accel="tcg",
    sandbox=True,
    vhost_vsock=False,
    tsc_khz=None,
)
BOTH: list[Driver] = [FIRECRACKER, QEMU]
both = pytest.mark.parametrize("driver", BOTH, ids=lambda d: d.name)


@both
def test_a_launch_is_pure_and_runs_in_the_runtime_directory(driver: Driver) -> None:
    launch = driver.build_launch(make_machine())
    assert launch == driver.build_launch(make_machine())
    assert launch.argv[0] == str(driver.program)
    assert launch.cwd == make_machine().runtime


@both
def test_a_launch_names_sockets_without_a_directory(driver: Driver) -> None:
    # A socket's path holds 108 bytes; the runtime directory may be deeper than that.
    deep = Path("/run") / ("d" * 200)
    argv = driver.build_launch(make_machine(runtime=deep)).argv
    assert not [word for word in argv if str(deep) in word]
    assert [word for word in argv if "api.sock" in word]


@both
def test_user_networking_is_there_as_promised(driver: Driver) -> None:
    machine = make_machine(nic=USER)
    if driver.capabilities.user_network:
        driver.build_launch(machine)
    else:
        with pytest.raises(BangerError) as failed:
            driver.build_launch(machine)
        assert failed.value.reason == "unsupported"


@both
def test_vsock_is_there_as_promised(driver: Driver) -> None:
    machine = make_machine(vsock_cid=1030)
    if driver.capabilities.vsock:
        driver.build_launch(machine)
    else:
        with pytest.raises(BangerError) as failed:
            driver.build_launch(machine)
        assert failed.value.reason == "unsupported"


@both
@pytest.mark.asyncio
async def test_a_vmm_that_ends_before_its_socket_is_there_is_noticed(
    driver: Driver, tmp_path: Path
) -> None:
    exited = asyncio.Event()
    start = asyncio.ensure_future(driver.start(make_machine(runtime=tmp_path), exited))
    await asyncio.sleep(0)
    exited.set()
    with pytest.raises(BangerError) as failed:
        await asyncio.wait_for(start, PATIENCE_S)
    assert failed.value.reason == "vmm_exited"


@both
@pytest.mark.asyncio
async def test_a_vmm_that_ends_while_it_answers_is_noticed(driver: Driver, tmp_path: Path) -> None:
    exited = asyncio.Event()

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # As a dying process does: the socket is closed first, its exit is seen a little later.
        writer.close()
        asyncio.get_running_loop().call_later(0.1, exited.set)

    async with listening(tmp_path / "api.sock", die):
        with pytest.raises(BangerError) as failed:
            await driver.start(make_machine(runtime=tmp_path), exited)
    assert failed.value.reason == "vmm_exited"


@both
@pytest.mark.asyncio
async def test_a_vmm_whose_socket_never_comes_is_given_up(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(BangerError) as failed:
        await driver.start(make_machine(runtime=tmp_path), asyncio.Event(), timeout_s=0.1)
    assert failed.value.reason == "timeout"
    assert "0.1 s" in failed.value.message


@both
@pytest.mark.asyncio
async def test_pausing_a_vm_without_a_vmm_says_so(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(BangerError) as failed:
        await driver.pause(tmp_path)
    assert failed.value.reason == "connection_lost"


@pytest.mark.asyncio
async def test_a_cancelled_wait_leaves_no_task() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(
        before_exit(work(), asyncio.Event(), doing="waiting", timeout_s=60)
    )
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.asyncio
async def test_a_result_that_came_in_time_wins_over_an_exit() -> None:
    exited = asyncio.Event()

    async def work() -> int:
        exited.set()
        return 7

    assert await before_exit(work(), exited, doing="working", timeout_s=1) == 7


@pytest.mark.asyncio
async def test_a_socket_below_a_directory_of_two_hundred_bytes_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")

    # The server binds beside, where the name fits, and the socket is moved down.
    async with listening(tmp_path / "s", greet):
        (tmp_path / "s").rename(deep / "api.sock")
        async with connected(deep / "api.sock") as (reader, _):
            assert await reader.readline() == b"hello\n"


@pytest.mark.asyncio
async def test_waiting_outlasts_a_socket_on_which_nobody_listens_yet(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as early:
        early.bind(str(path))
        waiting = asyncio.ensure_future(wait_for_socket(path))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        early.listen()
        await asyncio.wait_for(waiting, PATIENCE_S)


def test_what_an_earlier_vmm_left_is_removed(tmp_path: Path) -> None:
    for name in ("api.sock", "vsock.sock", "announce.sock"):
        (tmp_path / name).touch()
    remove_stale_sockets(tmp_path)
    remove_stale_sockets(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["announce.sock"]
