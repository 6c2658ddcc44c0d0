"""A start that succeeds, and one that fails or is cancelled at each of its stages."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.host.vmm_process import is_alive, kill_vmm, launch_vmm
from banger.kernel.entries import get_kernel
from banger.progress import Silent
from banger.vm import create as create_module
from banger.vm import start as start_module
from banger.vm.cleanup import is_live
from banger.vm.handles import write_handles
from banger.vm.start import start
from banger.vm.stop import delete, stop
from fakes.driver import PANIC, Boot
from fakes.faults import broken
from fakes.guest import BOOT_ID, announce
from fakes.world import EMPTY, World
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


class Stages:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.names.append(stage)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def warn(self, message: str) -> None: ...


async def test_created_vm_runs_and_holds_what_it_needs(world: World) -> None:
    vm = await world.create("web")
    assert (vm.state, vm.vmm, vm.boot_id) == ("running", "firecracker", BOOT_ID)
    assert vm.address == "172.16.0.2"
    assert is_live(world.ctx, vm)
    census = world.census()
    assert census["leases"] == census["directories"] == [vm.id]
    assert len(census["processes"]) == 1
    assert world.host.leases[world.handles(vm).lease_id or ""].address == vm.address  # type: ignore[index]  # a LeaseId


async def test_stages_come_in_their_order(world: World) -> None:
    report = Stages()
    await create_module.create(world.ctx, world.params("web"), world.image, report)
    assert report.names == [
        "reserve", "plan", "disks", "lease", "handles", "launch", "ready", "publish",
    ]  # fmt: skip


async def test_guest_is_told_who_it_is_by_a_private_initrd(world: World) -> None:
    vm = await world.create("web")
    initrd = world.paths.vm(vm.id).initrd
    config = world.driver.guests[vm.id].config
    assert initrd.stat().st_mode & 0o777 == 0o600
    # The machine has read it; nothing of it stays on the disk.
    assert initrd.stat().st_size == 0
    assert (config["vm_id"], config["hostname"]) == (vm.id, "web")
    assert config["network"]["address"] == vm.address
    assert len(config["token"]) == 64


async def test_host_key_is_known_before_the_first_contact(world: World) -> None:
    vm = await world.create("web")
    key = world.driver.guests[vm.id].config["host_key_pub"].split()[1]
    (line,) = world.paths.known_hosts.read_text().splitlines()
    assert line.split() == [f"web.vm,{vm.address}", "ssh-ed25519", key]


async def test_start_of_a_running_vm_changes_nothing(world: World) -> None:
    vm = await world.create("web")
    before = world.handles(vm)
    assert await world.start(vm) == vm
    assert world.handles(vm) == before


async def test_created_but_not_started_vm_holds_its_address_and_nothing_else(world: World) -> None:
    vm = await world.create("web", start=False)
    assert (vm.state, vm.address) == ("created", "172.16.0.2")
    assert world.census() == {**EMPTY, "rows": ["web"], "directories": [vm.id]}


# --- failures -------------------------------------------------------------------------------------

Sabotage = Callable[[World, pytest.MonkeyPatch], object]


def no_image(world: World, patch: pytest.MonkeyPatch) -> None:
    world.rootfs.unlink()


def no_memory(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("banger.vm.admission.host_memory_mib", lambda: 128)


def full_disk(world: World, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(start_module, "write_vm_initrd", fail)


def no_lease(world: World, patch: pytest.MonkeyPatch) -> None:
    world.faults.fail("host.prepare")


def lost_lease(world: World, patch: pytest.MonkeyPatch) -> None:
    world.faults.fail("host.prepare.reply")


def fail_write(number: int) -> Sabotage:
    def sabotage(world: World, patch: pytest.MonkeyPatch) -> None:
        count = 0

        def write(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            write_handles(*args)

        patch.setattr(start_module, "write_handles", write)

    return sabotage


def no_launch(world: World, patch: pytest.MonkeyPatch) -> None:
    world.faults.fail("driver.build_launch")


def no_program(world: World, patch: pytest.MonkeyPatch) -> None:
    world.driver.program = Path("/nonexistent/vmm")


def no_start(world: World, patch: pytest.MonkeyPatch) -> None:
    world.faults.fail("driver.start")


def boots(kind: Boot) -> Sabotage:
    return lambda world, patch: world.driver.boots.append(kind)


FAILURES: dict[str, tuple[Sabotage, str]] = {
    "image": (no_image, "is not what was stored"),
    "memory": (no_memory, "banger may use"),
    "disks": (full_disk, "No space left"),
    "lease": (no_lease, r"host\.prepare failed"),
    "lease made, answer lost": (lost_lease, r"host\.prepare\.reply failed"),
    "handles": (fail_write(1), "Input/output error"),
    "launch": (no_launch, r"driver\.build_launch failed"),
    "program": (no_program, "/nonexistent/vmm"),
    "handles after launch": (fail_write(2), "Input/output error"),
    "configuration": (no_start, r"driver\.start failed"),
    "vmm exit": (boots("dies_early"), r"status 1\): bad option"),
    "guest exit": (boots("dies"), r"Kernel panic"),
}


@pytest.mark.parametrize("stage", FAILURES)
async def test_create_that_fails_leaves_nothing(
    world: World, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage, message = FAILURES[stage]
    sabotage(world, monkeypatch)
    with pytest.raises((BangerError, OSError), match=message):
        await world.create()
    assert world.census() == EMPTY


@pytest.mark.parametrize("stage", FAILURES)
async def test_start_that_fails_gives_back_what_it_took_and_keeps_the_vm(
    world: World, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create(start=False)
    sabotage, message = FAILURES[stage]
    sabotage(world, monkeypatch)
    with pytest.raises((BangerError, OSError), match=message):
        await world.start(vm)
    after = world.census()
    assert after.pop("rows") == ["web"]
    assert after.pop("directories") == [vm.id]
    after.pop("known_hosts")  # belongs to the VM, and goes with it
    assert {kind: rows for kind, rows in after.items() if rows} == {}


async def test_address_and_name_of_a_failed_create_are_free_again(world: World) -> None:
    world.faults.fail("host.prepare")
    with pytest.raises(BangerError):
        await world.create("web")
    assert (await world.create("web")).address == "172.16.0.2"


async def test_error_of_a_dead_guest_quotes_its_panic(world: World) -> None:
    world.driver.boots.append("dies")
    with pytest.raises(BangerError) as caught:
        await world.create()
    first = caught.value.message.splitlines()[0]
    assert first.endswith(f"(status 3): {PANIC}")


async def test_error_quotes_this_boot_and_not_the_one_before(world: World) -> None:
    vm = await world.create("web", start=False)
    world.driver.boots.extend(["dies", "dies_early"])
    with pytest.raises(BangerError, match="Kernel panic"):
        await world.start(vm)
    with pytest.raises(BangerError) as caught:
        await world.start(vm)
    assert "Kernel panic" not in caught.value.message


async def test_full_disk_has_its_own_reason(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(world, monkeypatch)
    with pytest.raises(BangerError) as caught:
        await world.create()
    assert caught.value.reason == "disk_full"


async def test_disk_reserve_is_respected_before_anything_is_made(templates: Path) -> None:
    world = World(templates=templates, disk_reserve="900T")
    try:
        with pytest.raises(BangerError) as caught:
            await world.create()
        assert caught.value.reason == "disk_full"
        assert world.census() == EMPTY
    finally:
        await world.close()


async def test_memory_budget_names_who_uses_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create("first", memory_mib=500)
    monkeypatch.setattr("banger.vm.admission.host_memory_mib", lambda: 1000)
    with pytest.raises(BangerError, match="in use: 564 MiB .first 500 MiB.") as caught:
        await world.create("second", memory_mib=500)
    assert (caught.value.reason, caught.value.hint) == ("memory_admission", "banger vm stop first")
    assert (await world.create("third", memory_mib=500, allow_overcommit=True)).state == "running"


async def test_two_starts_at_once_do_not_both_get_the_last_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is 950 of 1000 MiB: one of the two fits, whoever comes first."""
    monkeypatch.setattr("banger.vm.admission.host_memory_mib", lambda: 1000)
    made = await asyncio.gather(
        world.create("one", memory_mib=500), world.create("two", memory_mib=500),
        return_exceptions=True,
    )  # fmt: skip
    refused = [e for e in made if isinstance(e, BangerError)]
    assert [e.reason for e in refused] == ["memory_admission"], made
    running = next(vm.name for vm in made if isinstance(vm, VmRecord))
    assert f"in use: 564 MiB ({running} 500 MiB)" in str(refused[0])


async def test_start_that_failed_holds_no_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.vm.admission.host_memory_mib", lambda: 1000)
    first = await world.create("first", memory_mib=500, start=False)
    world.faults.fail("driver.build_launch")
    with pytest.raises(BangerError):
        await world.start(first)
    async with world.ctx.locked(first.id):
        assert (await world.create("second", memory_mib=500)).state == "running"


# --- a rollback that fails ------------------------------------------------------------------------


async def test_rollback_failure_is_attached_and_the_vm_stays_in_error(world: World) -> None:
    world.faults.fail("driver.start")
    # The first release clears away what an earlier run might have left.
    world.faults.fail("host.release", after=1)
    with pytest.raises(BangerError) as caught:
        await world.create("web")
    assert caught.value.message == "driver.start failed on purpose"
    (also,) = caught.value.also
    assert also.endswith("releasing the lease: host.release failed on purpose")
    vm = world.store.resolve("web")
    assert vm.state == "error"
    assert world.census()["leases"] == [vm.id]
    assert world.census()["processes"] == []


async def test_vm_whose_rollback_failed_can_still_be_deleted(world: World) -> None:
    reached = world.faults.hang("driver.start")
    creating = asyncio.ensure_future(world.create("web"))
    await reached.wait()
    world.faults.fail("host.release")
    creating.cancel()
    with pytest.raises(BangerError, match="could not all be given back") as caught:
        await creating
    assert (caught.value.reason, caught.value.outcome) == ("cancelled", "unknown")
    vm = world.store.resolve("web")
    assert vm.state == "error"
    assert "host.release failed" in (vm.last_error or "")
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


async def test_rollback_that_is_cancelled_once_more_is_finished_and_its_failure_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, releasing, go = world.faults.hang("driver.start"), asyncio.Event(), asyncio.Event()
    creating = asyncio.ensure_future(world.create("web"))
    await reached.wait()

    async def fail_late(lease_id: str) -> None:
        releasing.set()
        await go.wait()
        raise broken("host.release")

    with monkeypatch.context() as patch:
        patch.setattr(world.host, "release", fail_late)
        creating.cancel()
        await releasing.wait()
        creating.cancel()
        await asyncio.sleep(0)
        assert not creating.done()
        go.set()
        with pytest.raises(BangerError, match="could not all be given back"):
            await creating
    vm = world.store.resolve("web")
    assert (vm.state, len(world.host.leases)) == ("error", 1), "what it holds has an owner"
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


# --- the guest's word -----------------------------------------------------------------------------


@pytest.mark.parametrize("boot", ["silent", "liar", "stranger"])
async def test_vm_that_does_not_announce_itself_is_kept_and_said_so(
    templates: Path, boot: Boot
) -> None:
    world = World(templates=templates, ready_timeout="1s")
    try:
        world.driver.boots.append(boot)
        with pytest.raises(BangerError, match="no answer from the guest agent within 1 s") as e:
            await world.create("web")
        assert e.value.reason == "guest_not_ready"
        vm = world.store.resolve("web")
        assert is_live(world.ctx, vm)
        assert (vm.state, vm.boot_id) == ("running", None)
        assert "did not announce itself" in (vm.last_error or "")
        assert (await world.ctx.client(vm).health()).hostname == "web"
    finally:
        await world.close()


async def test_right_announcement_counts_after_a_wrong_one(world: World) -> None:
    world.driver.boots.append("liar")
    creating = asyncio.ensure_future(world.create("web"))
    while not world.driver.guests:
        await asyncio.sleep(0.001)
    (guest,) = world.driver.guests.values()
    assert await guest.announce()
    assert (await creating).state == "running"


async def test_emulated_guest_gets_three_times_as_long(world: World) -> None:
    capabilities = world.driver.capabilities
    world.driver.capabilities = msgspec.structs.replace(capabilities, emulated=True)
    vm = await world.create("web", start=False)
    plan = await start_module._plan(
        world.ctx, vm, world.image, get_kernel(world.paths, vm.kernel), world.driver
    )
    assert plan.ready_timeout_s == 90


# --- cancellation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["host.prepare", "host.prepare.reply", "driver.start"])
async def test_create_that_is_cancelled_leaves_nothing(world: World, point: str) -> None:
    reached = world.faults.hang(point)
    creating = asyncio.ensure_future(world.create())
    await reached.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert world.census() == EMPTY


async def test_create_that_is_cancelled_while_it_waits_for_its_guest_leaves_nothing(
    world: World,
) -> None:
    world.driver.boots.append("silent")
    creating = asyncio.ensure_future(world.create())
    while not world.driver.guests:
        await asyncio.sleep(0.001)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert world.census() == EMPTY


@pytest.mark.parametrize("function", ["ensure_private_directory", "write_blank_disk"])
async def test_create_that_is_cancelled_while_its_disks_are_made_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """The thread that makes them cannot be stopped: it must not make them anew afterwards."""
    arrived, go_on = threading.Event(), threading.Event()
    real = getattr(start_module, function)

    def slow(*args: Any) -> Any:
        arrived.set()
        assert go_on.wait(PATIENCE_S)
        return real(*args)

    monkeypatch.setattr(start_module, function, slow)
    creating = asyncio.ensure_future(world.create())
    await asyncio.to_thread(arrived.wait)
    creating.cancel()
    await asyncio.sleep(0.02)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    while any("asyncio_" in t.name and _busy(t) for t in threading.enumerate()):
        await asyncio.sleep(0.001)
    assert world.census() == EMPTY


def _busy(thread: threading.Thread) -> bool:
    """Whether a pool's thread is inside the start."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == start_module.__file__:
            return True
        frame = frame.f_back
    return False


async def test_create_that_is_cancelled_twice_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves, and then the daemon has to end while the rollback is under way."""
    starting = world.faults.hang("driver.start")
    creating = asyncio.ensure_future(world.create())
    await starting.wait()
    releasing = world.faults.passed.count("host.release")
    creating.cancel()
    while world.faults.passed.count("host.release") == releasing:
        await asyncio.sleep(0)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await world.ctx.settle()
    assert world.census() == EMPTY


# --- what an earlier run left ---------------------------------------------------------------------


async def test_machine_of_an_earlier_daemon_is_ended_before_its_disks_are_used_again(
    world: World,
) -> None:
    vm = await world.create("web")
    first = world.handles(vm).process
    assert first is not None
    await world.ctx.close()
    # No cgroup ends it along with the lease, as on a host that has none.
    (world.root / "cgroups" / vm.id / "cgroup.procs").write_text("")
    # As after a reconcile whose cleanup failed: the record says error, the handles are on disk.
    vm = world.store.update(vm.id, state="error", last_error="the helper was gone")
    world.ctx = world.new_context()
    vm = await world.start(vm)
    assert vm.state == "running"
    assert not is_alive(first)
    assert len(world.census()["processes"]) == 1


async def test_start_refuses_while_the_rest_of_an_earlier_run_cannot_be_given_back(
    world: World,
) -> None:
    vm = await world.create("web", start=False)
    world.faults.fail("host.release")
    with pytest.raises(BangerError, match="could not be given back") as caught:
        await world.start(vm)
    assert caught.value.hint == "banger vm kill web"
    assert world.census()["processes"] == []


# --- the disks of a second start ------------------------------------------------------------------


async def test_second_start_keeps_the_disks_and_grows_them_when_asked(world: World) -> None:
    vm = await world.create("web")
    paths = world.paths.vm(vm.id)
    with paths.work.open("r+b") as f:
        f.seek(1 << 20)
        f.write(b"the user's data")
    await stop(world.ctx, vm)
    vm = world.store.update(vm.id, work_disk_bytes=128 << 20)
    await world.start(vm)
    assert paths.work.stat().st_size == 128 << 20
    assert paths.overlay.stat().st_size == 64 << 20
    with paths.work.open("rb") as f:
        f.seek(1 << 20)
        assert f.read(15) == b"the user's data"


async def test_handles_are_on_disk_before_the_machine_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    async def launch(*args: Any, **options: Any) -> Any:
        (path,) = world.paths.vms.glob("*/handles.json")
        seen.append(json.loads(path.read_bytes()))
        return await launch_vmm(*args, **options)

    monkeypatch.setattr(start_module, "launch_vmm", launch)
    vm = await world.create("web")
    assert (seen[0]["lease_id"], seen[0]["process"]) == (vm.id, None)


async def test_announcement_for_a_vm_that_does_not_start_is_refused(
    world: World, tmp_path: Path
) -> None:
    vm: VmRecord = await world.create("web")
    token = world.driver.guests[vm.id].config["token"]
    with world.ctx.announcements.listen_unix(world.root / "late.sock"):
        assert not await announce(world.root / "late.sock", vm_id=vm.id, token=token)


@pytest.mark.parametrize("lost", [("work",), ("overlay",), ("work", "overlay"), ("directory",)])
async def test_lost_disk_is_not_replaced_by_an_empty_one(
    world: World, lost: tuple[str, ...]
) -> None:
    vm = await world.create("web")
    vm, _ = await stop(world.ctx, vm)
    paths = world.paths.vm(vm.id)
    before = world.census()
    kept = world.root / "kept"
    if lost == ("directory",):
        paths.directory.rename(kept)
    else:
        kept.mkdir()
        for name in lost:
            getattr(paths, name).rename(kept / name)
    with pytest.raises(BangerError, match="is missing, with what the VM had written") as caught:
        await world.start(vm)
    assert (caught.value.reason, caught.value.outcome) == ("disk_missing", "failed")
    assert caught.value.hint == "banger vm delete web"
    assert not (paths.work.exists() and paths.overlay.exists()), "nothing was made in its place"
    # Put back from a backup, it runs again, with its files.
    if lost == ("directory",):
        kept.rename(paths.directory)
    else:
        for name in lost:
            (kept / name).rename(getattr(paths, name))
    assert world.census() == before
    assert (await world.start(vm)).state == "running"


async def test_vm_with_a_lost_disk_can_be_deleted(world: World) -> None:
    vm = await world.create("web")
    vm, _ = await stop(world.ctx, vm)
    world.paths.vm(vm.id).work.unlink()
    await delete(world.ctx, vm)
    assert world.census() == EMPTY


async def test_vm_that_never_ran_gets_its_first_disks(world: World) -> None:
    """Also where an earlier first start failed half-way: nothing of the user's was on them."""
    vm = await world.create("web", start=False)
    world.faults.fail("driver.start")
    with pytest.raises(BangerError):
        await world.start(vm)
    world.paths.vm(vm.id).work.unlink()
    assert (await world.start(vm)).state == "running"


async def end_unseen(world: World, vm: VmRecord) -> None:
    """The machine ends, and whoever asks next is quicker than its watcher."""
    process = world.handles(vm).process
    assert process is not None
    await kill_vmm(process, None)


async def test_start_that_fails_after_an_unseen_end_leaves_no_row_that_says_running(
    world: World,
) -> None:
    vm = await world.create()
    async with world.ctx.locked(vm.id):
        vm = world.store.update(vm.id, paused="no room")
        await end_unseen(world, vm)
        world.driver.boots.append("dies")
        with pytest.raises(BangerError, match="Kernel panic"):
            await start(world.ctx, vm, Silent(), allow_overcommit=False)
    vm = world.store.resolve("web")
    assert (vm.state, vm.paused) == ("stopped", None)


async def test_machine_that_ended_while_it_was_paused_is_not_paused_at_its_next_start(
    world: World,
) -> None:
    vm = await world.create()
    async with world.ctx.locked(vm.id):
        vm = world.store.update(vm.id, paused="no room")
        await end_unseen(world, vm)
        vm = await start(world.ctx, vm, Silent(), allow_overcommit=False)
    assert (vm.state, vm.paused) == ("running", None)
