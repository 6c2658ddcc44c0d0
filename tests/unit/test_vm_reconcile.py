"""A daemon is killed; the next one adopts what lives and gives back what was left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from banger.config.paths import VmPaths
from banger.errors import BangerError
from banger.files import remove_tree
from banger.host.lease import LeasePlan
from banger.host.vmm_process import find_process, is_alive, kill_vmm
from banger.vm import reconcile as reconcile_module
from banger.vm.cleanup import as_it_is, is_live
from banger.vm.handles import write_handles
from banger.vm.machines import began_after
from banger.vm.reconcile import reconcile
from banger.vm.stop import delete, kill, stop
from fakes.guest import announce
from fakes.world import EMPTY, World
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


async def test_running_vm_is_adopted_and_not_touched(world: World) -> None:
    vm = await world.create()
    before = world.handles(vm)
    await world.crash()
    assert world.store.resolve("web") == vm
    assert world.handles(vm) == before
    assert is_live(world.ctx, vm)
    assert (await world.ctx.client(vm).health()).hostname == "web"


async def test_end_of_an_adopted_vm_is_noticed(world: World) -> None:
    vm = await world.create()
    await world.crash()
    world.driver.power_off(vm.id)
    import asyncio

    async with asyncio.timeout(PATIENCE_S):
        while world.store.resolve("web").state == "running":
            await asyncio.sleep(0.002)
    assert world.census()["leases"] == []


async def test_adopted_vm_stops_in_order(world: World) -> None:
    vm = await world.create()
    await world.crash()
    vm, note = await stop(world.ctx, vm)
    assert (vm.state, note) == ("stopped", None)
    assert world.driver.guests[vm.id].asked == ["shutdown"]


async def test_vm_that_ended_while_no_daemon_ran_is_stopped_and_says_so(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    await world.ctx.close()
    await kill_vmm(process, None)
    await world.crash()
    vm = world.store.resolve("web")
    assert vm.state == "stopped"
    assert vm.last_error == "the machine ended while no daemon was running"
    assert {k for k, rows in world.census().items() if rows} == {
        "rows", "directories", "known_hosts",
    }  # fmt: skip


@pytest.mark.parametrize("point", ["driver.start", "host.prepare.reply"])
async def test_create_that_died_half_way_is_rolled_back(world: World, point: str) -> None:
    reached = world.faults.hang(point)
    world.leave(world.create())
    await reached.wait()
    assert len(world.census()["rows"]) == 1
    await world.crash()
    assert world.census() == EMPTY


async def test_vm_that_was_only_created_outlives_a_first_start_that_died(world: World) -> None:
    vm = await world.create(start=False)
    reached = world.faults.hang("driver.start")
    world.leave(world.start(vm))
    await reached.wait()
    await world.crash()
    assert world.store.resolve("web").state == "created"
    assert world.census()["leases"] == []
    assert (await world.start(vm)).state == "running"


async def test_start_that_died_half_way_leaves_the_vm_stopped_with_its_disks(world: World) -> None:
    vm = await world.create()
    vm, _ = await stop(world.ctx, vm)
    reached = world.faults.hang("driver.start")
    world.leave(world.start(vm))
    await reached.wait()
    await world.crash()
    assert world.store.resolve("web").state == "stopped"
    assert world.paths.vm(vm.id).work.exists()
    census = world.census()
    assert [census[k] for k in ("leases", "processes", "sockets", "handles")] == [[], [], [], []]
    assert (await world.start(vm)).state == "running"


async def test_lease_that_was_made_before_its_handles_is_released(world: World) -> None:
    reached = world.faults.hang("host.prepare.reply")
    world.leave(world.create())
    await reached.wait()
    assert len(world.census()["leases"]) == 1
    await world.crash()
    assert world.census()["leases"] == []


@pytest.mark.parametrize("damage", ["cut", "no text", "missing", "without its process"])
async def test_machine_whose_handles_are_lost_is_adopted_by_its_lease(
    world: World, damage: str
) -> None:
    vm = await world.create()
    before, path = world.handles(vm), world.paths.vm(vm.id).handles
    match damage:
        case "cut":
            path.write_bytes(b'{"vmm":"fire')
        case "no text":
            path.write_bytes(path.read_bytes().replace(b"tap-fc", b"tap-\xff\xfe"))
        case "missing":
            path.unlink()
        case _:
            write_handles(world.paths.vm(vm.id), msgspec.structs.replace(before, process=None))
    await world.crash()
    assert world.store.resolve("web") == vm
    assert world.handles(vm) == before
    assert is_live(world.ctx, vm) and not world.ctx.undecided
    assert (await world.ctx.client(vm).health()).hostname == "web"
    vm, note = await stop(world.ctx, vm)
    assert (vm.state, note) == ("stopped", None)


async def test_machine_whose_lease_cannot_be_asked_for_either_is_left_and_told(
    world: World,
) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.paths.vm(vm.id).handles.unlink()
    world.faults.fail("host.status")
    await world.crash()
    assert is_alive(process)
    assert world.store.resolve("web").state == "running"
    (undecided,) = world.ctx.undecided.values()
    assert f"VM web runs (pid {process.pid})" in undecided.what
    assert undecided.command == "banger vm kill web"
    # Looking at it changes nothing, and a start does not replace it.
    assert as_it_is(world.ctx, vm) == vm
    with pytest.raises(BangerError, match="what it holds is not known"):
        await world.start(vm)
    assert is_alive(process)
    # The helper is back: now it can be decided.
    assert (await reconcile(world.ctx)).did
    assert is_live(world.ctx, vm) and not world.ctx.undecided


async def test_machine_of_which_nothing_is_known_ends_when_its_user_says_so(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.paths.vm(vm.id).handles.unlink()
    world.faults.fail("host.status")
    await world.crash()
    vm, _ = await kill(world.ctx, vm, "KILL")
    assert vm.state == "stopped"
    assert not is_alive(process) and not world.ctx.undecided
    assert world.census()["leases"] == []


async def test_machine_that_runs_though_its_row_says_stopped_is_adopted(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.store.update(vm.id, state="stopped", boot_id=None)
    await world.crash()
    now = world.store.resolve("web")
    assert (now.state, now.boot_id) == ("running", vm.boot_id)
    assert is_live(world.ctx, now) and is_alive(process)


async def test_machine_that_runs_unrecorded_and_does_not_answer_is_left_and_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.driver.guests[vm.id].shutdown = "absent"
    # Written long after the machine had begun: this is no start that died half-way.
    monkeypatch.setattr("banger.vm.reconcile.began_after", lambda process, moment: False)
    world.store.update(vm.id, state="stopped")
    await world.crash()
    assert is_alive(process)
    assert world.store.resolve("web").state == "stopped"
    (undecided,) = world.ctx.undecided.values()
    assert undecided.what.endswith("recorded as stopped, and its guest does not answer")
    await delete(world.ctx, vm)
    assert not is_alive(process)
    assert world.census() == EMPTY


async def test_time_of_a_record_tells_whether_a_process_came_after_it(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    now = datetime.now(UTC)
    assert began_after(process, (now - timedelta(minutes=1)).isoformat())
    assert not began_after(process, (now + timedelta(minutes=1)).isoformat())


async def test_machine_without_a_row_is_never_touched(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.lose_row(vm)
    before = world.census()
    await world.crash()
    assert is_alive(process)
    after = world.census()
    assert {**after, "names": []} == {**before, "names": []}
    (undecided,) = world.ctx.undecided.values()
    assert "which belongs to no VM" in undecided.what
    assert undecided.command == f"kill {process.pid}"


async def test_disks_without_a_row_stay_and_are_told(world: World) -> None:
    """A database that was lost or restored must not take the users' disks with it."""
    vm = await world.create()
    await stop(world.ctx, vm)
    world.lose_row(vm)
    await world.crash()
    assert world.paths.vm(vm.id).work.exists()
    (undecided,) = world.ctx.undecided.values()
    assert undecided.command == f"rm -r {world.paths.vm(vm.id).directory}"


async def test_directory_without_a_row_and_without_disks_is_removed(world: World) -> None:
    vm = await world.create(start=False)
    world.lose_row(vm)
    await world.crash()
    assert world.census() == EMPTY


async def test_directory_whose_lease_cannot_be_given_back_waits_for_the_next_daemon(
    world: World,
) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    world.lose_row(vm)
    await world.ctx.close()
    await kill_vmm(process, None)
    world.paths.vm(vm.id).work.unlink()
    world.faults.fail("host.release")
    await world.crash()
    assert world.census()["handles"] == [vm.id]
    await world.crash()
    assert world.census()["directories"] == []
    assert world.census()["leases"] == []


async def test_vm_whose_directory_is_gone_is_told_and_can_be_deleted(world: World) -> None:
    vm = await world.create()
    await stop(world.ctx, vm)
    remove_tree(world.paths.vm(vm.id).directory)
    await world.crash()
    (undecided,) = world.ctx.undecided.values()
    assert "the directory of VM web is gone, with its disks" in undecided.what
    with pytest.raises(BangerError, match="is gone, with its disks"):
        await world.start(vm)
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


async def test_what_is_not_ours_in_the_directory_of_vms_stays(world: World) -> None:
    (world.paths.vms / "notes").mkdir()
    (world.paths.vms / "a").touch()
    await world.crash()
    assert world.census()["directories"] == ["a", "notes"]


async def test_lease_without_a_row_is_released(world: World) -> None:
    await world.host.prepare(
        LeasePlan(
            vm_id="e" * 32, bridge_name="br-fc", bridge_address="172.16.0.1", bridge_prefix=24,
            guest_address="172.16.0.9", isolate=True, announce_port=7001,
            vcpu=1, memory_mib=256,
        )
    )  # fmt: skip
    await world.crash()
    assert world.census() == EMPTY


async def test_helper_that_does_not_answer_keeps_no_daemon_from_starting(world: World) -> None:
    vm = await world.create()
    world.faults.fail("host.status")
    await world.crash()
    assert is_live(world.ctx, vm)


async def test_cleanup_that_fails_at_start_is_shown_and_repeated_by_delete(world: World) -> None:
    vm = await world.create()
    process = world.handles(vm).process
    assert process is not None
    await world.ctx.close()
    await kill_vmm(process, None)
    world.faults.fail("host.release")
    await world.crash()
    vm = world.store.resolve("web")
    assert vm.state == "error"
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


async def test_process_that_took_over_the_pid_is_not_mistaken_for_the_machine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    paths: VmPaths = world.paths.vm(vm.id)
    process = world.handles(vm).process
    assert process is not None
    await world.ctx.close()
    old = str(process.start_time).encode()
    paths.handles.write_bytes(
        paths.handles.read_bytes().replace(old, str(process.start_time - 1).encode())
    )
    # Elsewhere and with another cgroup the stranger is nobody's business.
    world.host.leases.clear()
    (world.root / "cgroups" / vm.id / "cgroup.procs").write_text("")
    monkeypatch.setattr("banger.vm.reconcile.find_machines", lambda directory: {})
    monkeypatch.setattr("banger.vm.cleanup.find_machine", lambda paths: None)
    await world.crash()
    assert world.store.resolve("web").state == "stopped"
    assert is_alive(process)


async def test_process_of_another_boot_is_not_mistaken_for_the_machine(world: World) -> None:
    """The state directory outlives a reboot, and with it what was noted of a machine."""
    vm = await world.create()
    handles = world.handles(vm)
    assert handles.process is not None
    await world.ctx.close()
    await kill_vmm(handles.process, None)
    world.host.leases.clear()
    bystander = subprocess.Popen(["sleep", "1000"], cwd="/")
    try:
        stranger = find_process(bystander.pid)
        assert stranger is not None
        then = msgspec.structs.replace(stranger, boot_id="0b0d3b5e-5d3a-4a5c-8f2e-000000000000")
        noted = msgspec.structs.replace(handles, process=then, cgroup=None)
        write_handles(world.paths.vm(vm.id), noted)
        await world.crash()
        assert world.store.resolve("web").state == "stopped"
        assert world.census()["handles"] == []
        assert is_alive(stranger)
    finally:
        bystander.kill()
        bystander.wait()


async def test_handles_that_were_written_without_a_boot_are_still_good(world: World) -> None:
    vm = await world.create()
    path = world.paths.vm(vm.id).handles
    document = json.loads(path.read_bytes())
    assert document["process"].pop("boot_id")
    path.write_text(json.dumps(document))
    await world.crash()
    assert is_live(world.ctx, vm) and not world.ctx.undecided
    assert json.loads(path.read_bytes()) == document


async def test_announcement_is_believed_only_with_the_token_of_an_expected_vm(
    world: World,
) -> None:
    socket = world.root / "announce.sock"
    announcements = world.ctx.announcements
    with announcements.listen_unix(socket), announcements.expect("a" * 32, "secret") as future:
        assert not await announce(socket, vm_id="a" * 32, token="wrong")
        assert not await announce(socket, vm_id="b" * 32, token="secret")
        assert not await announce(socket, vm_id="a" * 32, token="secret", protocol=2)
        assert not future.done()
        assert await announce(socket, vm_id="a" * 32, token="secret")
        assert (await future).vm_id == "a" * 32


async def test_leftovers_that_cannot_be_removed_keep_no_daemon_from_its_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files that became root's: each is told, and everything else is done."""
    vm = await world.create()
    kept = [
        world.paths.vms / f".delete-{'1' * 32}",
        world.paths.vms / ("2" * 32),
        world.paths.runtime / "vms" / ("3" * 12),
    ]
    for directory in kept:
        directory.mkdir(parents=True)

    def refuse(path: Path) -> None:
        if path in kept:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / "f"))
        remove_tree(path)

    monkeypatch.setattr(reconcile_module, "remove_tree", refuse)
    await world.crash()
    assert is_live(world.ctx, vm)
    done = await reconcile(world.ctx)
    assert len(done.failures) == 3
    assert all(any(str(directory) in failure for failure in done.failures) for directory in kept)
    for directory in kept:
        directory.rmdir()
