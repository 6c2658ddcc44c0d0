"""How a VM ends: asked, forced, by itself, and when giving back does not work the first time."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.files import remove_tree
from banger.host.vmm_process import is_alive, kill_vmm
from banger.vm import create as create_module
from banger.vm.cleanup import as_it_is, is_live
from banger.vm.stop import check_signal, delete, kill, stop
from fakes.world import EMPTY, World
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


async def until_stopped(world: World, vm: VmRecord) -> VmRecord:
    """Wait until somebody has noticed that the machine ended."""
    async with asyncio.timeout(PATIENCE_S):
        while (now := world.store.resolve(vm.id)).state == "running":
            await asyncio.sleep(0.002)
    return now


def only_its_own(world: World, vm: VmRecord) -> None:
    """A stopped VM has a row, a directory and a known host key, and nothing on the host."""
    census = world.census()
    assert census.pop("rows") == [vm.name]
    assert census.pop("directories") == [vm.id]
    assert len(census.pop("known_hosts")) == 1
    assert {kind: rows for kind, rows in census.items() if rows} == {}


async def test_stop_asks_the_guest_and_gives_everything_back(world: World) -> None:
    vm = await world.create()
    vm, note = await stop(world.ctx, vm)
    assert (vm.state, vm.last_error, vm.boot_id, note) == ("stopped", None, None, None)
    assert world.driver.guests[vm.id].asked == ["shutdown"]
    only_its_own(world, vm)


async def test_stopped_vm_starts_again_at_its_address(world: World) -> None:
    vm = await world.create()
    stopped, _ = await stop(world.ctx, vm)
    again = await world.start(stopped)
    assert (again.state, again.address) == ("running", vm.address)


async def test_stop_of_a_stopped_vm_says_so(world: World) -> None:
    vm = await world.create(start=False)
    vm, note = await stop(world.ctx, vm)
    assert (vm.state, note) == ("created", "VM web was not running")


async def test_guest_that_nobody_reaches_is_killed_and_the_user_is_told(world: World) -> None:
    vm = await world.create()
    world.driver.guests[vm.id].shutdown = "absent"
    vm, note = await stop(world.ctx, vm)
    assert vm.state == "stopped"
    assert "did not answer; it was killed" in (note or "")
    only_its_own(world, vm)


async def test_guest_that_refuses_to_stop_is_killed(world: World) -> None:
    vm = await world.create()
    world.driver.guests[vm.id].shutdown = "refuses"
    vm, note = await stop(world.ctx, vm)
    assert vm.state == "stopped"
    assert note
    only_its_own(world, vm)


async def test_guest_that_does_not_end_is_killed_after_its_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.vm.stop._AGENT_S", 0.1)
    vm = await world.create()
    world.driver.guests[vm.id].shutdown = "ignores"
    vm, note = await stop(world.ctx, vm, timeout_s=0.1)
    assert vm.state == "stopped"
    assert note == "VM web did not end within 0.1 s and was killed"
    only_its_own(world, vm)


async def test_kill_asks_nobody(world: World) -> None:
    vm = await world.create()
    vm, note = await kill(world.ctx, vm, "KILL")
    assert (vm.state, note) == ("stopped", None)
    assert world.driver.guests[vm.id].asked == []
    only_its_own(world, vm)


async def test_kill_sends_the_signal_that_was_asked_for(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    vm, _ = await kill(world.ctx, vm, "SIGTERM")
    assert vm.state == "stopped"
    assert not is_alive(process)


async def test_kill_of_a_machine_that_has_just_ended_cleans_up(world: World) -> None:
    """Before its watcher had a turn."""
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.ctx.unwatch(vm.id)
    await kill_vmm(process, None)
    vm, _ = await kill(world.ctx, vm, "TERM")
    assert vm.state == "stopped"
    only_its_own(world, vm)


@pytest.mark.parametrize("name", ["TERM", "SIGTERM", "term", "sigkill"])
async def test_signal_is_known_with_and_without_its_prefix(name: str) -> None:
    assert check_signal(name) in ("TERM", "KILL")


@pytest.mark.parametrize("name", ["STOP", "CONT", "9", "", "SIG"])
async def test_signal_that_is_not_for_vms_is_refused(name: str) -> None:
    with pytest.raises(BangerError) as caught:
        check_signal(name)
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize("running", [True, False])
async def test_delete_leaves_nothing(world: World, running: bool) -> None:
    vm = await world.create(start=running)
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


async def test_delete_of_one_vm_leaves_the_others(world: World) -> None:
    kept = await world.create("kept")
    gone = await world.create("gone")
    await delete(world.ctx, gone)
    assert is_live(world.ctx, kept)
    census = world.census()
    assert census["leases"] == census["directories"] == [kept.id]
    assert [line.split()[0] for line in census["known_hosts"]] == [f"kept.vm,{kept.address}"]


async def test_deleted_vm_gives_its_address_back(world: World) -> None:
    first = await world.create("first")
    await world.create("second")
    await delete(world.ctx, first)
    assert (await world.create("third")).address == first.address


async def test_delete_of_an_ephemeral_vm_does_not_ask_the_guest(world: World) -> None:
    vm = await world.create()
    await delete(world.ctx, vm, kill_it=True)
    assert world.driver.guests[vm.id].asked == []
    assert world.census() == EMPTY


async def test_machine_that_ends_by_itself_is_stopped_and_its_record_says_why(
    world: World,
) -> None:
    vm = await world.create()
    world.driver.power_off(vm.id, "exit 7")
    vm = await until_stopped(world, vm)
    assert (vm.state, vm.last_error) == ("stopped", "the machine ended by itself (status 7)")
    only_its_own(world, vm)


async def test_reader_of_a_record_sees_an_ended_machine_even_before_its_watcher(
    world: World,
) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.ctx.unwatch(vm.id)
    await kill_vmm(process, None)
    assert not is_live(world.ctx, vm)
    assert as_it_is(world.ctx, vm).state == "stopped"
    vm, _ = await stop(world.ctx, vm)
    only_its_own(world, vm)


async def test_machine_that_ends_during_a_stop_is_stopped_once(world: World) -> None:
    vm = await world.create()
    guest = world.driver.guests[vm.id]
    guest.shutdown = "ignores"
    stopping = asyncio.ensure_future(stop(world.ctx, vm))
    while "shutdown" not in guest.asked:
        await asyncio.sleep(0.001)
    world.driver.power_off(vm.id, "exit 9")
    vm, note = await stopping
    assert (vm.state, vm.last_error, note) == ("stopped", None, None)
    only_its_own(world, vm)


async def test_two_stops_at_once_agree(world: World) -> None:
    vm = await world.create()
    results = await asyncio.gather(stop(world.ctx, vm), stop(world.ctx, vm))
    assert [r.state for r, _ in results] == ["stopped", "stopped"]
    assert sorted(note or "" for _, note in results) == ["", "VM web was not running"]
    only_its_own(world, vm)


async def test_stop_that_waited_for_a_delete_says_that_the_vm_is_gone(world: World) -> None:
    vm = await world.create()
    deleted, stopped = await asyncio.gather(
        delete(world.ctx, vm), stop(world.ctx, vm), return_exceptions=True
    )
    assert deleted is None
    assert isinstance(stopped, BangerError)
    assert stopped.code == "not_found"
    assert world.census() == EMPTY


# --- giving back that fails -----------------------------------------------------------------------


async def test_cleanup_tries_every_step_reports_all_and_finishes_when_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.vm import cleanup

    vm = await world.create()
    world.faults.fail("host.release")
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        patch.setattr(cleanup, "remove_tree", refuse)
        vm, _ = await stop(world.ctx, vm)
    assert vm.state == "error"
    assert "releasing the lease: host.release failed on purpose" in (vm.last_error or "")
    assert "removing its sockets: " in (vm.last_error or "")
    assert world.census()["handles"] == [vm.id]
    vm, _ = await stop(world.ctx, vm)
    assert vm.state == "stopped"
    only_its_own(world, vm)


async def test_lease_is_kept_while_the_machine_cannot_be_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tap that is given to another VM while the old VMM still holds it swallows packets."""
    from banger.vm import cleanup

    async def hangs(*_: object) -> None:
        raise BangerError("operation_failed", "killing the VMM: it is still there after 60 s")

    vm = await world.create()
    with monkeypatch.context() as patch:
        patch.setattr(cleanup, "kill_vmm", hangs)
        vm, _ = await kill(world.ctx, vm, "KILL")
    assert vm.state == "error"
    assert world.census()["leases"] == [vm.id]
    vm, _ = await kill(world.ctx, vm, "KILL")
    assert vm.state == "stopped"
    only_its_own(world, vm)


async def test_delete_that_cannot_finish_keeps_the_vm_and_its_address(world: World) -> None:
    vm = await world.create()
    world.faults.fail("host.release")
    with pytest.raises(BangerError, match=r"host\.release failed") as caught:
        await delete(world.ctx, vm)
    assert caught.value.hint == "banger vm delete web"
    assert world.store.resolve("web").state == "error"
    assert (await world.create("other")).address != vm.address
    await delete(world.ctx, vm)
    assert [row.name for row in world.store.list()] == ["other"]


async def test_kill_with_another_signal_repeats_a_cleanup_too(world: World) -> None:
    vm = await world.create()
    world.faults.fail("host.release")
    vm, _ = await stop(world.ctx, vm)
    assert vm.state == "error"
    vm, _ = await kill(world.ctx, vm, "TERM")
    assert vm.state == "stopped"
    only_its_own(world, vm)


# --- what needs a running VM ----------------------------------------------------------------------


async def test_call_to_a_guest_that_does_not_run_says_what_to_type(world: World) -> None:
    vm = await world.create(start=False)
    with pytest.raises(BangerError, match="VM web is created") as caught:
        world.ctx.client(vm)
    assert (caught.value.code, caught.value.hint) == ("not_running", "banger vm start web")


async def test_work_with_a_guest_ends_when_its_machine_does(world: World) -> None:
    vm = await world.create()
    working = asyncio.ensure_future(world.ctx.while_running(vm, asyncio.Event().wait()))
    await asyncio.sleep(0)
    world.driver.power_off(vm.id)
    with pytest.raises(BangerError, match="the machine ended") as caught:
        await working
    assert caught.value.reason == "connection_lost"


async def test_work_with_a_guest_gives_its_result(world: World) -> None:
    vm = await world.create()
    health = await world.ctx.while_running(vm, world.ctx.client(vm).health())
    assert health.hostname == "web"


async def test_a_deletion_that_dies_half_way_leaves_no_vm_without_its_disks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create(start=False)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("banger.vm.create.sync_directory", die)
        with pytest.raises(KeyboardInterrupt):
            await delete(world.ctx, vm)
    # Nothing was removed yet: it is there, and can be deleted.
    assert [found.id for found in world.store.list()] == [vm.id]
    assert world.paths.vm(vm.id).directory.exists()
    await world.crash()
    await delete(world.ctx, world.store.resolve("web"))
    assert world.census() == EMPTY


async def test_a_deletion_that_is_cancelled_while_its_disks_go_ends_when_they_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create(start=False)
    reached, go = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        reached.set()
        assert go.wait(10)
        remove_tree(path)

    monkeypatch.setattr(create_module, "remove_tree", slow)
    forgetting = asyncio.create_task(create_module.forget_vm(world.ctx, vm))
    assert await asyncio.to_thread(reached.wait, 10)
    for _ in range(3):
        forgetting.cancel()
        await asyncio.sleep(0)
    assert not forgetting.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await forgetting
    assert world.census() == EMPTY


async def test_known_hosts_that_a_full_disk_keeps_do_not_keep_the_vm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    await stop(world.ctx, vm)
    real = create_module.replace_host

    def full_until_it_is_gone(*words: Any) -> None:
        if world.paths.vm(vm.id).directory.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*words)

    monkeypatch.setattr(create_module, "replace_host", full_until_it_is_gone)
    await delete(world.ctx, vm)
    census = world.census()
    assert census["rows"] == census["directories"] == census["known_hosts"] == []
