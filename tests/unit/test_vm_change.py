"""`vm set` on fakes: what changes at once, what waits, and what is refused."""

from __future__ import annotations

import pytest

from banger.api.params import SetVm
from banger.errors import BangerError
from banger.vm.change import change
from banger.vm.stop import stop
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


async def test_nothing_to_change_is_refused(world: World) -> None:
    vm = await world.create()
    with pytest.raises(BangerError, match="nothing to change"):
        await change(world.ctx, vm, SetVm(vm="web"))
