"""What the daemon looks after by itself: clocks, room, logs, figures, VMs that nobody uses.

The clock, the free space and the guests' answers are the test's own; nothing here waits.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.records import VmRecord
from banger.daemon.sweeps import CONSOLE_KEPT, CONSOLE_MOST, Sweeps
from banger.errors import BangerError
from banger.files import aside, bound_file
from banger.host import clock
from banger.host.clock import Reading, find_jump
from banger.units import GIB, MIB
from banger.vm import idle, observe, space
from banger.vm import start as start_module
from banger.vm.plan import StartPlan
from banger.vm.stop import stop
from fakes.world import World

NOW = Reading(monotonic_s=1000.0, boottime_s=1000.0, unix_s=1e9)
IDLE = {"result": {"streams": 0, "sessions": 0, "ssh": 0}}


def later(*, s: float, slept_s: float = 0, set_s: float = 0) -> Reading:
    """`NOW` after `s` seconds awake and `slept_s` asleep, with the clock set by `set_s`."""
    return Reading(
        monotonic_s=NOW.monotonic_s + s,
        boottime_s=NOW.boottime_s + s + slept_s,
        unix_s=NOW.unix_s + s + slept_s + set_s,
    )


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (later(s=100_000), None),
        (later(s=10, slept_s=0.9), None),
        (later(s=10, slept_s=3600), "the host slept for 3600 s"),
        (later(s=10, set_s=-0.9), None),
        (later(s=10, set_s=120), "the host's clock was set 120 s ahead"),
        (later(s=10, set_s=-120), "the host's clock was set 120 s back"),
    ],
)
def test_jump_of_the_hosts_clock_is_seen(now: Reading, what: str | None) -> None:
    assert find_jump(NOW, now) == what


def test_clocks_are_those_of_this_host() -> None:
    reading = clock.read_clocks()
    assert reading.boottime_s >= reading.monotonic_s > 0
    assert abs(reading.unix_s - datetime.now(UTC).timestamp()) < 60


class Clocks:
    def __init__(self) -> None:
        self.reading = NOW

    def __call__(self) -> Reading:
        return self.reading


def sweeps(world: World, clocks: Clocks | None = None) -> Sweeps:
    return Sweeps(world.ctx, helper_log=None, read_clocks=clocks or Clocks())


def refuse_time(world: World, vm: VmRecord) -> None:
    world.driver.guests[vm.id].answers["time"] = {
        "error": {"code": "operation_failed", "message": "no"}
    }


@pytest.mark.asyncio
async def test_guests_are_told_the_time_once_after_the_host_slept(world: World) -> None:
    vms = [await world.create(name) for name in ("one", "two")]
    for vm in vms:
        world.driver.guests[vm.id].answers["time"] = {"result": {}}
    clocks = Clocks()
    loop = sweeps(world, clocks)
    await loop.check_clocks()
    assert [world.driver.guests[vm.id].asked for vm in vms] == [[], []]
    clocks.reading = later(s=5, slept_s=8000)
    await loop.check_clocks()
    await loop.check_clocks()
    assert [world.driver.guests[vm.id].asked for vm in vms] == [["time"], ["time"]]


@pytest.mark.asyncio
async def test_guest_that_boots_while_the_host_sleeps_is_told_the_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told when it announced itself. Then the host sleeps, and somebody asks for something:
    all are told but this one, which is in no record as running yet."""
    clocks = Clocks()
    monkeypatch.setattr(clock, "read_clocks", clocks)
    loop = sweeps(world, clocks)
    ready = start_module._ready

    async def then_sleep(announced: Any, exited: Any, plan: StartPlan, start: int) -> Any:
        announcement = await ready(announced, exited, plan, start)
        world.driver.guests[plan.vm.id].answers["time"] = {"result": {}}
        clocks.reading = later(s=5, slept_s=8000)
        await loop.check_clocks()
        return announcement

    monkeypatch.setattr(start_module, "_ready", then_sleep)
    vm = await world.create()
    assert world.driver.guests[vm.id].asked == ["time"]
    await loop.check_clocks()
    assert world.driver.guests[vm.id].asked == ["time"]


@pytest.mark.asyncio
@pytest.mark.parametrize("damaged", [False, True])
async def test_guests_that_are_adopted_are_told_the_time_if_the_host_slept_without_a_daemon(
    world: World, damaged: bool
) -> None:
    vm = await world.create()
    guest = world.driver.guests[vm.id]
    guest.answers["time"] = {"result": {}}
    clocks, kept = Clocks(), world.paths.clocks
    first = Sweeps(world.ctx, helper_log=None, kept=kept, read_clocks=clocks)
    await first.check_clocks()
    await world.crash()
    if damaged:
        kept.write_bytes(b'{"monotonic_s":\xff')
    clocks.reading = later(s=5, slept_s=8000)
    for _ in range(2):
        # The second daemon finds that the first one has told them.
        following = Sweeps(world.ctx, helper_log=None, kept=kept, read_clocks=clocks)
        await following.check_clocks()
        assert guest.asked == ([] if damaged else ["time"])
        await world.crash()


@pytest.mark.asyncio
async def test_guest_that_takes_no_time_keeps_nobody_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    vm = await world.create()
    refuse_time(world, vm)
    clocks = Clocks()
    loop = sweeps(world, clocks)
    clocks.reading = later(s=5, slept_s=8000)
    await loop.check_clocks()
    assert "its clock was not set" in caplog.text


@pytest.mark.asyncio
async def test_vm_that_ends_while_the_others_are_told_is_no_matter(world: World) -> None:
    vm = await world.create()
    await stop(world.ctx, vm)
    await space.send_time(world.ctx, vm)
    assert world.driver.guests[vm.id].asked == ["shutdown"]


# Use


def stale(world: World, vm: VmRecord, *, for_s: float) -> VmRecord:
    touched = (datetime.now(UTC) - timedelta(seconds=for_s)).isoformat(timespec="milliseconds")
    return world.store.update(vm.id, touched_at=touched)


@pytest.mark.asyncio
async def test_only_running_vms_that_were_not_touched_are_stale(world: World) -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    vm = await world.create()
    running = msgspec.structs.replace(vm, touched_at="2026-01-01T11:00:00.000Z")
    used = msgspec.structs.replace(running, name="used", touched_at="2026-01-01T11:59:00.000Z")
    stopped = msgspec.structs.replace(running, name="stopped", state="stopped")
    paused = msgspec.structs.replace(running, name="paused", paused="full")
    building = msgspec.structs.replace(running, name="building", building=True)
    every = [running, used, stopped, paused, building]
    assert idle.find_stale(every, now, 600) == [running]
    assert idle.find_stale(every, now, 3601) == []
    assert idle.find_stale(every, now, 0) == []


@pytest.mark.asyncio
async def test_vm_that_nobody_uses_is_stopped_and_says_why(templates: Path) -> None:
    world = World(templates=templates, auto_stop_stale_after="30m")
    try:
        vm = await world.create()
        other = await world.create("fresh")
        world.driver.guests[vm.id].answers["activity"] = IDLE
        stale(world, vm, for_s=1801)
        await sweeps(world).look(stale=True)
        await world.ctx.settle()
        after = world.store.resolve("web")
        assert after.state == "stopped"
        assert after.last_error == "nobody used it for 30m (auto_stop_stale_after)"
        assert world.driver.guests[vm.id].asked[-1] == "shutdown"
        assert world.store.resolve(other.id).state == "running"
        with pytest.raises(BangerError, match="is stopped .nobody used it for 30m"):
            world.ctx.client(after)
    finally:
        await world.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["streams", "sessions", "ssh"])
async def test_guest_in_use_is_touched_instead(world: World, what: str) -> None:
    vm = await world.create()
    world.driver.guests[vm.id].answers["activity"] = {"result": {**IDLE["result"], what: 1}}
    before = stale(world, vm, for_s=10_000)
    assert not await idle.stop_if_unused(world.ctx, before)
    after = world.store.resolve(vm.id)
    assert (after.state, after.touched_at > before.touched_at) == ("running", True)


@pytest.mark.asyncio
async def test_guest_that_does_not_say_is_left_alone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    vm = stale(world, await world.create(), for_s=10_000)
    assert not await idle.stop_if_unused(world.ctx, vm)
    assert world.store.resolve(vm.id).state == "running"
    assert "whether it is used is not known" in caplog.text


@pytest.mark.asyncio
async def test_vm_that_is_touched_just_before_its_stop_is_not_stopped(world: World) -> None:
    vm = stale(world, await world.create(), for_s=10_000)
    idle.touch(world.ctx, vm)
    vm, _ = await stop(world.ctx, vm, untouched_since=vm.touched_at)
    assert vm.state == "running"


@pytest.mark.asyncio
async def test_vm_with_an_operation_under_way_is_not_looked_at(world: World) -> None:
    vm = stale(world, await world.create(), for_s=10_000)
    world.driver.guests[vm.id].answers["activity"] = IDLE
    async with world.ctx.locked(vm.id):
        assert not await idle.stop_if_unused(world.ctx, vm)


# Room


@pytest.mark.parametrize(
    ("free", "warned", "pauses", "goes_on"),
    [
        (8 * GIB, False, False, True),
        (4 * GIB, False, False, True),
        (4 * GIB - 1, True, False, True),
        (2 * GIB - 1, True, False, False),
        (1 * GIB - 1, True, True, False),
        (0, True, True, False),
    ],
)
def test_room_is_judged_by_the_reserve(
    free: int, warned: bool, pauses: bool, goes_on: bool
) -> None:
    reserve = 4 * GIB
    warning = space.find_warning(Path("/state"), free=free, reserve=reserve)
    assert (warning is not None) == warned
    assert space.must_pause(free=free, reserve=reserve) == pauses
    assert space.may_go_on(free=free, reserve=reserve) == goes_on


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: free)


@pytest.mark.asyncio
async def test_full_disk_pauses_vms_until_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reserve of this world is 1 MiB."""
    vm = await world.create()
    world.driver.guests[vm.id].answers["time"] = {"result": {}}
    set_free(monkeypatch, MIB // 2)
    await sweeps(world).look(stale=False)
    assert world.store.resolve(vm.id).paused is None
    assert (space.marked(world.ctx, vm).warning or "").startswith(str(world.paths.state))
    set_free(monkeypatch, 1000)
    await sweeps(world).look(stale=False)
    paused = world.store.resolve(vm.id)
    assert (paused.state, world.driver.standing) == ("running", {vm.id})
    assert "disk_reserve" in (paused.paused or "")
    with pytest.raises(BangerError, match="VM web is paused: .* free, less than the 1M") as caught:
        world.ctx.client(paused)
    assert (caught.value.reason, caught.value.hint) == ("disk_full", "banger vm prune")
    set_free(monkeypatch, GIB)
    await world.crash()
    await sweeps(world).look(stale=False)
    after = world.store.resolve(vm.id)
    assert (after.paused, world.driver.standing) == (None, set())
    assert "time" in world.driver.guests[vm.id].asked
    assert space.marked(world.ctx, after).warning is None


@pytest.mark.asyncio
async def test_vmm_that_does_not_pause_leaves_its_vm_running(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    set_free(monkeypatch, 1000)
    world.faults.fail("driver.pause")
    await sweeps(world).look(stale=False)
    assert world.store.resolve(vm.id).paused is None


@pytest.mark.asyncio
async def test_paused_vm_is_let_go_on_to_be_stopped_in_order(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    set_free(monkeypatch, 1000)
    await sweeps(world).look(stale=False)
    vm, note = await stop(world.ctx, vm)
    assert (vm.state, vm.paused, note) == ("stopped", None, None)
    assert world.driver.guests[vm.id].asked == ["time", "shutdown"]
    assert world.driver.standing == set()


# Logs


def test_file_that_has_grown_too_long_is_emptied_and_its_end_kept(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not bound_file(path, most_bytes=100, kept_bytes=10)
        writer.write(b"the end!")
        assert bound_file(path, most_bytes=100, kept_bytes=10)
        # The writer has it open for append, as a VMM has: no hole, nothing lost.
        writer.write(b"goes on")
    assert aside(path).read_bytes() == b"aathe end!"
    assert path.read_bytes() == b"goes on"


def test_file_is_emptied_even_where_there_is_no_room_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"x" * 101)
    calls: list[int] = []
    real = os.fsync

    def full_at_first(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(28, os.strerror(28))
        real(fd)

    monkeypatch.setattr(os, "fsync", full_at_first)
    assert bound_file(path, most_bytes=100, kept_bytes=10)
    assert (path.read_bytes(), aside(path).read_bytes()) == (b"", b"x" * 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["console.log", "console.log.1"]


def test_link_in_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x" * 101)
    (tmp_path / "console.log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        bound_file(tmp_path / "console.log", most_bytes=100, kept_bytes=10)
    assert target.stat().st_size == 101


async def printed(world: World, vm: VmRecord, **options: Any) -> bytes:
    defaults: dict[str, Any] = {"tail": None, "follow": False}
    return b"".join([c async for c in observe.logs(world.ctx, vm, **{**defaults, **options})])


@pytest.mark.asyncio
async def test_long_console_is_bounded_and_still_shown_whole(world: World) -> None:
    vm = await world.create()
    path = world.paths.vm(vm.id).console
    path.write_bytes(b"lost\n" + b"x" * CONSOLE_MOST + b"\nfirst\n")
    await sweeps(world).look(stale=False)
    assert (path.stat().st_size, aside(path).stat().st_size) == (0, CONSOLE_KEPT)
    with path.open("ab") as f:
        f.write(b"second\n")
    shown = await printed(world, vm)
    assert shown.endswith(b"x\nfirst\nsecond\n")
    assert await printed(world, vm, tail=2) == b"first\nsecond\n"
    assert await printed(world, vm, tail=1) == b"second\n"


@pytest.mark.asyncio
async def test_follower_of_a_console_that_is_emptied_goes_on_at_its_beginning(world: World) -> None:
    vm = await world.create()
    path = world.paths.vm(vm.id).console
    path.write_bytes(b"before\n")
    chunks = observe.logs(world.ctx, vm, tail=None, follow=True)
    assert await anext(chunks) == b"before\n"
    path.write_bytes(b"new\n")
    assert await anext(chunks) == b"new\n"


@pytest.mark.asyncio
async def test_log_of_the_root_helper_is_bounded(world: World, tmp_path: Path) -> None:
    await world.create()
    path = tmp_path / "banger-root.log"
    path.write_bytes(b"x" * (4 * MIB + 1))
    await Sweeps(world.ctx, helper_log=path).look(stale=False)
    assert (path.stat().st_size, aside(path).stat().st_size) == (0, 4 * MIB)


# Figures


@pytest.mark.asyncio
async def test_figures_are_kept_in_the_record_and_nothing_else_changes(world: World) -> None:
    vm = await world.create()
    world.driver.guests[vm.id].answers["stats"] = {
        "result": {
            "uptime_s": 3.5, "load": [0.5, 0.1, 0.0],
            "memory": {"total_bytes": 128 << 20, "available_bytes": 64 << 20}, "filesystems": [],
        }
    }  # fmt: skip
    before = world.store.resolve(vm.id)
    await sweeps(world).look(stale=False)
    after = world.store.resolve(vm.id)
    assert after.stats is not None and after.stats.guest is not None
    assert after.stats.vmm_rss_bytes > 0
    assert after.stats.guest["load"] == [0.5, 0.1, 0.0]
    assert msgspec.structs.replace(after, stats=None) == before


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        {"result": {
            "uptime_s": 3.5, "load": [0.5, 0.1, 0.0],
            "memory": {"total_bytes": 1, "available_bytes": 1},
            "filesystems": [{"path": "/x" * 100, "total_bytes": 1, "free_bytes": 1}] * 4000,
        }},
        {"result": {
            "uptime_s": 3.5, "load": [0.5] * 100_000,
            "memory": {"total_bytes": 1, "available_bytes": 1},
        }},
        {"error": {"code": "operation_failed", "message": "no" * 400_000}},
    ],
    ids=["filesystems", "load", "words"],
)  # fmt: skip
async def test_figures_of_a_guest_that_says_too_much_leave_the_record_small(
    world: World, answer: dict[str, Any]
) -> None:
    """A list of all VMs is one line, and a line has an end: no guest may make it unreadable."""
    vm = await world.create()
    world.driver.guests[vm.id].answers["stats"] = answer
    await sweeps(world).look(stale=False)
    after = world.store.resolve(vm.id)
    assert after.stats is not None
    assert (after.stats.guest, bool(after.stats.guest_error)) == (None, True)
    assert len(msgspec.json.encode(after)) < 4096


@pytest.mark.asyncio
async def test_figures_that_cannot_be_kept_stop_no_look(
    templates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what follows is looked at all the same."""
    world = World(templates=templates, auto_stop_stale_after="60s")
    try:
        vm = stale(world, await world.create(), for_s=61)
        world.driver.guests[vm.id].answers["activity"] = IDLE

        def full(vm_id: str, stats: object) -> None:
            raise BangerError("operation_failed", "writing: the disk is full", reason="disk_full")

        monkeypatch.setattr(world.store, "keep_stats", full)
        await sweeps(world).look(stale=True)
        await world.ctx.settle()
        assert world.store.resolve(vm.id).state == "stopped"
    finally:
        await world.close()


@pytest.mark.asyncio
async def test_share_of_a_cpu_is_of_the_time_between_two_looks(world: World) -> None:
    vm = await world.create()
    first = await observe.stats(world.ctx, vm)
    then = datetime.fromisoformat(first.sampled_at)
    before = msgspec.structs.replace(first, vmm_cpu_s=10.0)
    percent = observe.cpu_percent
    assert percent(before, 15.0, then + timedelta(seconds=10)) == 50.0
    assert percent(before, 10.0, then + timedelta(seconds=10)) == 0.0
    assert percent(None, 15.0, then) is None
    assert percent(before, 9.0, then + timedelta(seconds=10)) is None  # another run of the VM
    assert percent(before, 15.0, then - timedelta(seconds=10)) is None
    known = msgspec.structs.replace(before, cpu_percent=40.0)
    assert percent(known, 15.0, then + timedelta(seconds=0.1)) == 40.0
