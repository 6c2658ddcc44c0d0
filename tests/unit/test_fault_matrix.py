"""Every step of a VM's life, every fault, every moment, against a host of fakes.

Each cell is one test: something goes wrong at one step, once. Afterwards rows, handles, leases,
processes, sockets, names and files agree; nothing of the user's is lost; the same command, given
again, succeeds; and when all VMs are deleted, nothing is left. A failure names its cell.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from banger.api.params import SetVm
from banger.api.records import VmRecord
from banger.config.file_sync import FileSync
from banger.errors import BangerError
from banger.faults import MOMENTS, STEPS, Order, arm, disarm
from banger.host.vmm_process import is_alive
from banger.vm.change import change
from banger.vm.cleanup import as_it_is, is_live
from banger.vm.handles import find_handles
from banger.vm.reconcile import reconcile
from banger.vm.stop import delete, kill, stop
from fakes.mortal import Mortal
from fakes.world import EMPTY, World, processes_below, temporary_templates
from patience import PATIENCE_S
from sample import EVERYTHING, pick

pytestmark = pytest.mark.asyncio

_MARKER = b"what the user wrote"


class Scenario(NamedTuple):
    """A command and the VM that it is for. `steps` are those that it passes where all goes well.

    `alone`: it goes on when its client leaves. `goal`: what the VM is then, None: it is gone.
    """

    before: str | None
    steps: tuple[str, ...]
    act: Callable[[World], Coroutine[Any, Any, Any]]
    goal: str | None
    alone: bool = False


async def _set(world: World) -> object:
    return await change(world.ctx, the_vm(world), SetVm(vm="web", nat=True, vcpu=2))


async def _create(world: World) -> object:
    return await world.create()


async def _start(world: World) -> object:
    return await world.start(the_vm(world))


async def _stop(world: World) -> object:
    return await world.ctx.finish_alone(stop(world.ctx, the_vm(world)), "stop")


async def _kill(world: World) -> object:
    return await world.ctx.finish_alone(kill(world.ctx, the_vm(world), "TERM"), "kill")


async def _delete(world: World) -> object:
    return await world.ctx.finish_alone(delete(world.ctx, the_vm(world)), "delete")


# What a start passes first of all; what it holds before is nothing.
_CLEAN = ("release.lease", "release.sockets", "release.handles")
_RELEASE = ("release.process", *STEPS["release"][1:])
SCENARIOS = {
    "create": Scenario(None, (*STEPS["create"], *STEPS["start"], *_CLEAN), _create, "running"),
    "start": Scenario("stopped", (*STEPS["start"], *_CLEAN), _start, "running"),
    "stop": Scenario("running", (*STEPS["stop"], *_RELEASE), _stop, "stopped", alone=True),
    "kill": Scenario("running", (*STEPS["kill"], *_RELEASE), _kill, "stopped", alone=True),
    "delete": Scenario(
        "running", (*STEPS["stop"], *_RELEASE, *STEPS["delete"]), _delete, None, alone=True
    ),
    "set": Scenario("running", STEPS["set"], _set, "running"),
}
# Of the user's network there is no lease; a jailed VMM is the helper's to start.
KINDS = ("bridge", "user", "jailed")
_NO_LEASE = ("start.lease", "release.lease", "set.lease", "set.handles")
# `hang` is a step that never ends, whose client gives up; `client` a client that is killed: to the
# daemon the two are one. `helper` dies at the call, before or after it has done what was asked.
FAULTS = ("fail", "enospc", "kill", "client", "vmm", "agent", "helper")
_HELPER = {"start.lease": "host.prepare", "set.lease": "host.prepare",
           "release.lease": "host.release", "start.launch": "host.launch"}  # fmt: skip


def _is_meant(kind: str, step: str, moment: str, fault: str, *, alone: bool) -> bool:
    if kind == "user" and step in _NO_LEASE:
        return False
    if fault == "client":
        return not alone
    if fault != "helper":
        return True
    launched = step != "start.launch" or kind == "jailed"
    return step in _HELPER and moment != "after" and launched and kind != "user"


def all_cells() -> Iterator[tuple[str, str, str]]:
    for name, scenario in SCENARIOS.items():
        for kind in KINDS:
            for step, moment, fault in itertools.product(scenario.steps, MOMENTS, FAULTS):
                if _is_meant(kind, step, moment, fault, alone=scenario.alone):
                    yield name, kind, f"{step}:{moment}:{fault}"


def cells() -> list[tuple[str, str, str]]:
    """All of them, or: every moment of every step with `kill` and one fault more, and of the two
    other kinds of VM one cell for each step."""
    everything = list(all_cells())
    if EVERYTHING:
        return everything
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    taken = []
    for cell in everything:
        name, kind, order = cell
        step, moment, fault = order.split(":")
        if kind == "bridge" and fault == "kill":
            taken.append(cell)
        elif kind == "bridge":
            groups.setdefault((name, kind, step, moment), []).append(cell)
        else:
            groups.setdefault((name, kind, step), []).append(cell)
    return taken + [pick(choices, *where) for where, choices in groups.items()]


@pytest.fixture(scope="module")
def memory() -> Iterator[None]:
    """Worlds in memory: what takes the time is fsync."""
    with pytest.MonkeyPatch.context() as patch:
        if os.access("/dev/shm", os.W_OK):
            patch.setattr(tempfile, "tempdir", "/dev/shm")
        yield


@pytest.fixture(scope="module")
def blanks(memory: None) -> Iterator[Path]:
    yield from temporary_templates()


@pytest_asyncio.fixture
async def make(
    blanks: Path, memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[str], World]]:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    made: list[World] = []

    def build(kind: str) -> World:
        world = World(
            templates=blanks,
            network="user" if kind == "user" else "bridge",
            jailed=kind == "jailed",
            stop_timeout="1s",
            file_sync=(FileSync(host="~/token", guest="~/token", when="start"),),
        )
        made.append(world)
        return world

    yield build
    disarm()
    for world in made:
        await world.close()


def the_vm(world: World) -> VmRecord:
    return world.store.resolve("web")


_STAYS = ("state/banger.db", "state/ssh", "run/vms", "cgroups", "jail", "jail/firecracker")


def files_of(world: World) -> set[str]:
    """Every file of the installation, but for what any VM leaves rightly."""
    names = (str(path.relative_to(world.root)) for path in world.root.rglob("*"))
    ssh = {f"state/ssh/{name}" for name in ("known_hosts", ".lock", "id_ed25519")}
    return {n for n in names if n not in (*_STAYS, *ssh) and not n.startswith("state/banger.db-")}


def check_that_all_agree(world: World) -> None:
    """Whatever happened: rows, handles, leases, machines, sockets, names, files say the same."""
    rows = world.store.list()
    running = {vm.id for vm in rows if vm.state == "running"}
    census = world.census()
    if world.network == "bridge":
        assert set(world.host.leases) == running
    assert set(census["handles"]) == running
    assert len(census["processes"]) == len(running)
    assert census["sockets"] == sorted(vm_id[:12] for vm_id in running)
    assert census["names"] == sorted(vm.name for vm in rows if vm.id in running)
    assert census["directories"] == sorted(vm.id for vm in rows)
    assert {vm.state for vm in rows} <= {"created", "stopped", "running"}, rows
    assert not [vm for vm in rows if vm.provisional]
    assert not world.ctx.undecided
    hosts = [line.split(",")[0].split(" ")[0] for line in census["known_hosts"]]
    assert set(hosts) <= {f"{vm.name}.vm" for vm in rows}
    for vm in rows:
        assert is_live(world.ctx, vm) == (vm.id in running)
        handles = find_handles(world.paths.vm(vm.id))
        if vm.id in running:
            assert handles is not None and handles.process is not None
            assert is_alive(handles.process)


async def set_up(world: World, scenario: Scenario) -> None:
    if scenario.before is None:
        return
    vm = await world.create()
    with world.paths.vm(vm.id).work.open("r+b") as f:
        f.write(_MARKER)
    if scenario.before == "stopped":
        await stop(world.ctx, vm)


def marker_is_there(world: World) -> bool:
    vm = the_vm(world)
    with world.paths.vm(vm.id).work.open("rb") as f:
        return f.read(len(_MARKER)) == _MARKER


def step_of(order: str) -> str:
    return order.split(":")[0]


def fault_ends_guest(world: World, order: str) -> bool:
    """Whether somebody has told the machine to end, beyond what a killed daemon could wait for."""
    told = any("shutdown" in guest.asked for guest in world.driver.guests.values())
    obeys = all(guest.shutdown == "obeys" for guest in world.driver.guests.values())
    return (told and obeys and step_of(order).startswith("stop.")) or step_of(order) == (
        "kill.signal"
    )


class Fault:
    """What the orders of a cell do to others than the operation itself."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mortal: Mortal | None = None
        self.task: asyncio.Task[Any] | None = None
        self.met = False

    def kill(self, order: Order) -> None:
        self.met = True
        assert self.mortal is not None
        self.mortal.kill()

    def client(self, order: Order) -> None:
        self.met = True
        assert self.task is not None
        self.task.cancel()

    def vmm(self, order: Order) -> None:
        self.met = True
        for pid in processes_below(self.world.paths.runtime) + processes_below(
            self.world.root / "jail"
        ):
            fd = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([fd], [], [], PATIENCE_S)
            os.close(fd)

    def agent(self, order: Order) -> None:
        self.met = True
        for guest in self.world.driver.guests.values():
            guest.shutdown = "absent"

    def helper(self, order: Order) -> None:
        self.met = True
        point = _HELPER[order.step]
        lost = BangerError("operation_failed", "the helper ended", reason="connection_lost")
        reply = order.moment == "during" and point != "host.release"
        self.world.faults.fail(f"{point}.reply" if reply else point, lost)


async def go_through(world: World, scenario: Scenario, order: str) -> None:
    """The command with its fault, up to where a daemon that lives would take the next command."""
    fault = Fault(world)
    actions = {a: getattr(fault, a) for a in ("kill", "client", "vmm", "agent", "helper")}
    arm([order], actions=actions)
    alone, killed = scenario.alone, order.endswith(":kill")
    if killed and alone:
        # What is killed is the daemon's own task, not the client that waits for it.
        def adopt(work: Coroutine[Any, Any, Any], what: str) -> Coroutine[Any, Any, Any]:
            return work

        world.ctx.finish_alone = adopt  # type: ignore[method-assign,assignment]  # of one test
    fault.mortal = Mortal(scenario.act(world))
    fault.task = world.leave(fault.mortal.run())
    died = asyncio.ensure_future(fault.mortal.dead.wait())
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait({fault.task, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if killed and fault.mortal.dead.is_set():
            await world.crash()
        else:
            with contextlib.suppress(BangerError, OSError, asyncio.CancelledError):
                await fault.task
        await world.ctx.settle()
    disarm()
    world.faults.clear()
    if killed and not fault.mortal.dead.is_set():
        await world.crash()
    # A guest that was told to end does so, whoever looks.
    if fault_ends_guest(world, order):
        async with asyncio.timeout(PATIENCE_S):
            while processes_below(world.paths.runtime) + processes_below(world.root / "jail"):
                await asyncio.sleep(0.001)
    # Its watcher corrects the record of a machine that has ended.
    async with asyncio.timeout(PATIENCE_S):
        while any(vm.id in world.ctx._watchers for vm in outdated(world)):
            await asyncio.sleep(0.001)


def outdated(world: World) -> list[VmRecord]:
    """Records that say running of machines that have ended; nobody is shown them so."""
    return [vm for vm in world.store.list() if as_it_is(world.ctx, vm).state != vm.state]


async def again(world: World, scenario: Scenario) -> None:
    """The same command, from where the fault has left things, reaches its goal."""
    there = any(vm.name == "web" for vm in world.store.list())
    if scenario.goal is None:
        if there:
            await scenario.act(world)
        assert not world.store.list()
        return
    if not there:
        assert scenario.before is None
        await scenario.act(world)
    elif the_vm(world).state != scenario.goal and scenario.goal == "running":
        await world.start(the_vm(world))
    elif scenario.before is not None:
        await scenario.act(world)
    assert the_vm(world).state == scenario.goal


@pytest.mark.parametrize(("name", "kind", "order"), cells())
async def test_whatever_fails_nothing_leaks_and_nothing_is_lost(
    make: Callable[[str], World], name: str, kind: str, order: str
) -> None:
    world, scenario = make(kind), SCENARIOS[name]
    image, clean = world.rootfs.read_bytes(), files_of(world)
    await set_up(world, scenario)
    await go_through(world, scenario, order)
    failed = [vm for vm in world.store.list() if vm.state == "error"]
    if failed or outdated(world) or step_of(order) == "delete.files":
        # A cleanup that was hindered says so, and is repeated on demand.
        assert all(vm.last_error for vm in failed)
        await reconcile(world.ctx)
    else:
        check_that_all_agree(world)
    # `doctor --fix` finds nothing to do then.
    assert await reconcile(world.ctx) == ((), ())
    check_that_all_agree(world)
    there = any(vm.name == "web" for vm in world.store.list())
    if scenario.before is not None and (there or scenario.goal is not None):
        assert marker_is_there(world)
    await again(world, scenario)
    check_that_all_agree(world)
    if scenario.before is not None and scenario.goal is not None:
        assert marker_is_there(world)
    for vm in world.store.list():
        await delete(world.ctx, vm, kill_it=True)
    assert world.census() == EMPTY
    assert files_of(world) == clean
    assert world.rootfs.read_bytes() == image


@pytest.mark.parametrize("name", list(SCENARIOS))
async def test_table_names_the_steps_that_are_passed(
    make: Callable[[str], World], name: str
) -> None:
    world, scenario = make("bridge"), SCENARIOS[name]
    await set_up(world, scenario)
    met = arm(())
    await scenario.act(world)
    assert set(met.steps) == set(scenario.steps)


async def test_matrix_has_every_step_of_a_vm() -> None:
    there = {step_of(order) for _, _, order in cells()}
    paths = ("create", "start", "stop", "kill", "release", "delete", "set")
    assert there == {step for path in paths for step in STEPS[path]}
