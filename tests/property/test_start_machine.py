"""Any order of create, start, stop, kill, delete and crash, with failures anywhere, adds up.

A model walks through the operations of `banger.vm` over one world of fakes. After every step what
the host holds, what the rows say and what lives must agree; at the end, deleting all VMs leaves
nothing. The run is bounded and derandomised: the same code gives the same walks everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.host.vmm_process import is_alive
from banger.vm.cleanup import is_live
from banger.vm.handles import find_handles
from banger.vm.stop import delete, kill, stop
from fakes.driver import Boot
from fakes.world import EMPTY, World, make_templates
from patience import PATIENCE_S

_POINTS = (
    "host.prepare",
    "host.prepare.reply",
    "host.release",
    "driver.build_launch",
    "driver.start",
)
_HANGING = ("host.prepare", "host.prepare.reply", "driver.start")
_BOOTS: tuple[Boot, ...] = ("ready", "ready", "dies", "dies_early")
_NAMES = st.sampled_from(["ant", "bee", "cat", "dog", "eel", "fox"])

# A point fails after so many passes; the last two rows make a rollback fail, too.
Ordered = list[tuple[str, int]]
faults: st.SearchStrategy[Ordered] = st.one_of(
    st.just([]),
    st.lists(st.tuples(st.sampled_from(_POINTS), st.integers(0, 2)), max_size=2),
    st.just([("driver.start", 0), ("host.release", 1)]),
    st.just([("host.prepare.reply", 0), ("host.release", 1)]),
)


class Lives(RuleBasedStateMachine):
    """`vms` holds ids. Who was deleted is not there any more, and a call says not_found."""

    vms: Bundle[str] = Bundle("vms")
    templates: Path

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world: World = self.runner.run(self._make())

    async def _make(self) -> World:
        # No graceful end needs longer, and a guest that ignores it is not waited for.
        return World(templates=self.templates, stop_timeout="1s")

    @initialize()
    def begin(self) -> None:
        assert self.world.census() == EMPTY

    def _order(self, ordered: Ordered) -> None:
        for point, after in ordered:
            self.world.faults.fail(point, after=after)

    def _do(self, work: Any) -> Any:
        """One operation; refusals are fine, anything but a BangerError is a bug."""
        try:
            return self.runner.run(work)
        except BangerError as e:
            note(f"refused: {e}")
            return None
        finally:
            self.world.faults.clear()
            self.world.driver.boots.clear()

    def _find(self, vm_id: str) -> VmRecord | None:
        return self.world.store.find(vm_id)

    @rule(
        target=vms, name=_NAMES, begin=st.booleans(), boot=st.sampled_from(_BOOTS), ordered=faults
    )
    def create(self, name: str, begin: bool, boot: Boot, ordered: Ordered) -> Any:
        before = {vm.id for vm in self.world.store.list()}
        self.world.driver.boots.append(boot)
        self._order(ordered)
        made = self._do(self.world.create(name, start=begin))
        new = [vm for vm in self.world.store.list() if vm.id not in before]
        if made is None:
            # Nothing is left of it, except where the rollback itself failed.
            assert all(vm.state == "error" for vm in new)
        return multiple(*(vm.id for vm in new))

    @rule(vm_id=vms, boot=st.sampled_from(_BOOTS), ordered=faults)
    def start(self, vm_id: str, boot: Boot, ordered: Ordered) -> None:
        if (vm := self._find(vm_id)) is None:
            return
        self.world.driver.boots.append(boot)
        self._order(ordered)
        started = self._do(self.world.start(vm))
        now = self._find(vm_id)
        assert now is not None
        if started is not None:
            assert now.state == "running"
        elif not ordered and boot == "ready":
            pytest.fail("a start that nothing hindered did not start")

    @rule(vm_id=vms, ordered=faults, absent=st.booleans())
    def stop(self, vm_id: str, ordered: Ordered, absent: bool) -> None:
        if (vm := self._find(vm_id)) is None:
            return
        if (guest := self.world.driver.guests.get(vm_id)) is not None:
            guest.shutdown = "absent" if absent else "obeys"
        self._order(ordered)
        done = self._do(stop(self.world.ctx, vm))
        assert done is not None, "stop does not fail: it leaves the VM in error"
        assert done[0].state in ("stopped", "error", "created")

    @rule(vm_id=vms, ordered=faults, name=st.sampled_from(["KILL", "TERM"]))
    def kill(self, vm_id: str, ordered: Ordered, name: str) -> None:
        if (vm := self._find(vm_id)) is None:
            return
        self._order(ordered)
        assert self._do(kill(self.world.ctx, vm, name)) is not None

    @rule(vm_id=consumes(vms), ordered=faults, kill_it=st.booleans())
    def delete(self, vm_id: str, ordered: Ordered, kill_it: bool) -> None:
        if (vm := self._find(vm_id)) is None:
            return
        self._order(ordered)
        self._do(delete(self.world.ctx, vm, kill_it=kill_it))
        if self._find(vm_id) is not None:
            self._do(delete(self.world.ctx, vm, kill_it=True))
        assert self._find(vm_id) is None

    @rule(vm_id=vms)
    def end_by_itself(self, vm_id: str) -> None:
        """The machine ends and its watcher notices."""
        vm = self._find(vm_id)
        if vm is None or not is_live(self.world.ctx, vm):
            return
        self.world.driver.power_off(vm_id)

        async def noticed() -> None:
            async with asyncio.timeout(PATIENCE_S):
                while (vm := self._find(vm_id)) is not None and vm.state == "running":
                    await asyncio.sleep(0.001)

        self._do(noticed())

    @rule(ordered=faults)
    def crash(self, ordered: Ordered) -> None:
        """The daemon is killed between two operations."""
        self._order(ordered)
        self._do(self.world.crash())

    @rule(target=vms, name=_NAMES, point=st.sampled_from(_HANGING))
    def crash_while_creating(self, name: str, point: str) -> Any:
        """The daemon is killed in the middle of a create."""
        before = {vm.id for vm in self.world.store.list()}

        async def go() -> None:
            reached = self.world.faults.hang(point)
            creating = self.world.leave(self.world.create(name))
            waiting = asyncio.ensure_future(reached.wait())
            await asyncio.wait({creating, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if creating.done():
                with contextlib.suppress(BangerError):
                    await creating
            await self.world.crash()

        self._do(go())
        return multiple(*(vm.id for vm in self.world.store.list() if vm.id not in before))

    @rule(name=_NAMES, point=st.sampled_from(_HANGING))
    def cancel_while_creating(self, name: str, point: str) -> None:
        """The client leaves in the middle of a create: nothing is left of it."""
        before = self.world.census()

        async def go() -> None:
            reached = self.world.faults.hang(point)
            creating = asyncio.ensure_future(self.world.create(name))
            waiting = asyncio.ensure_future(reached.wait())
            await asyncio.wait({creating, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            creating.cancel()
            # A refusal is fine. What else it may raise is not: not least the end of the test's own
            # time, which comes in the middle of anything and would leave something half done.
            with contextlib.suppress(asyncio.CancelledError, BangerError):
                await creating

        self._do(go())
        assert self.world.census() == before

    @invariant()
    def rows_leases_and_processes_agree(self) -> None:
        world = self.world
        rows = world.store.list()
        running = {vm.id for vm in rows if vm.state == "running"}
        unfinished = {vm.id for vm in rows if vm.state == "error"}
        leases = {str(lease) for lease in world.host.leases}
        assert running <= leases <= running | unfinished, "leases belong to running VMs"
        for vm in rows:
            handles = find_handles(world.paths.vm(vm.id))
            alive = (
                handles is not None and handles.process is not None and is_alive(handles.process)
            )
            assert is_live(world.ctx, vm) == (vm.id in running), vm
            assert alive == (vm.id in running) or vm.state == "error", vm
            assert handles is None or vm.state in ("running", "error"), vm
        census = world.census()
        assert len(census["processes"]) == len(running)
        assert set(census["directories"]) == {vm.id for vm in rows}
        addresses = [vm.address for vm in rows]
        assert len(set(addresses)) == len(addresses)

    def teardown(self) -> None:
        try:
            for vm in self.world.store.list():
                self.runner.run(delete(self.world.ctx, vm, kill_it=True))
            assert self.world.census() == EMPTY
        finally:
            self.runner.run(self.world.close())
            self.runner.close()


def test_whatever_happens_rows_leases_and_machines_agree() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bt"))
    try:
        Lives.templates = make_templates(directory)
        run_state_machine_as_test(
            Lives,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        shutil.rmtree(directory)
