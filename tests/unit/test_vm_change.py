"""`vm set` on fakes: what changes at once, what waits, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from banger.api.params import SetVm
from banger.errors import BangerError
from banger.vm.change import change
from banger.vm.stop import stop
from fakes.faults import broken
from fakes.world import World

pytestmark = pytest.mark.asyncio


async def test_nat_of_a_running_vm_changes_at_once_and_survives_the_daemon(world: World) -> None:
    vm = await world.create()
    assert not world.host.nat(vm.id)
    vm, later = await change(world.ctx, vm, SetVm(vm="web", nat=True))
    assert (vm.nat, later, world.host.nat(vm.id)) == (True, (), True)
    await world.crash()
    vm, later = await change(world.ctx, vm, SetVm(vm="web", nat=False))
    assert (vm.nat, later, world.host.nat(vm.id)) == (False, (), False)


async def test_nat_of_a_stopped_vm_is_there_at_its_next_start(world: World) -> None:
    vm = await world.create(nat=True)
    assert world.host.nat(vm.id)
    vm, _ = await stop(world.ctx, vm)
    vm, later = await change(world.ctx, vm, SetVm(vm="web", nat=False))
    assert (vm.nat, later) == (False, ())
    vm = await world.start(vm)
    assert not world.host.nat(vm.id)


async def test_a_refused_nat_leaves_the_record_as_it_was(world: World) -> None:
    vm = await world.create()
    world.faults.fail("host.prepare")
    with pytest.raises(BangerError):
        await change(world.ctx, vm, SetVm(vm="web", nat=True, vcpu=2))
    assert world.store.resolve("web") == vm


@pytest.mark.parametrize("nat", [True, False])
async def test_nat_that_is_cancelled_half_way_is_what_it_was(world: World, nat: bool) -> None:
    """A record that says less than the host does would leave a way out that nobody knows of."""
    vm = await world.create(nat=not nat)
    reached = world.faults.hang("host.prepare.reply")
    changing = asyncio.create_task(change(world.ctx, vm, SetVm(vm="web", nat=nat)))
    await reached.wait()
    assert world.host.nat(vm.id) is nat
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert (world.store.resolve("web").nat, world.host.nat(vm.id)) == (not nat, not nat)


async def test_nat_that_cannot_be_recorded_is_what_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()

    def fail(*_: object, **__: object) -> None:
        raise broken("store.update")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "update", fail)
        with pytest.raises(BangerError, match="store.update"):
            await change(world.ctx, vm, SetVm(vm="web", nat=True))
    assert not world.host.nat(vm.id)
    lease = world.handles(vm).lease
    assert lease is not None and not lease.nat
    assert not world.store.resolve("web").nat


async def test_nothing_to_change_is_refused(world: World) -> None:
    vm = await world.create()
    with pytest.raises(BangerError, match="nothing to change"):
        await change(world.ctx, vm, SetVm(vm="web"))
