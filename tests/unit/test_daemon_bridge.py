"""A bridge that the configuration changes under VMs."""

from __future__ import annotations

import msgspec
import pytest

from banger.daemon.daemon import keep_bridge_in_use
from banger.vm.stop import stop
from fakes.world import World

pytestmark = pytest.mark.asyncio


async def test_another_bridge_waits_while_a_vm_runs(world: World) -> None:
    vm = await world.create()
    wanted = msgspec.structs.replace(world.settings, bridge_ip="10.9.0.1", cidr=16)
    assert keep_bridge_in_use(wanted, world.store, world.paths) == world.settings
    await stop(world.ctx, vm)
    assert keep_bridge_in_use(wanted, world.store, world.paths) == wanted


async def test_a_stopped_vm_gets_an_address_of_the_new_subnet_at_its_next_start(
    world: World,
) -> None:
    await world.create("other", start=False)
    vm, _ = await stop(world.ctx, await world.create())
    world.ctx.settings = msgspec.structs.replace(world.settings, bridge_ip="10.9.0.2", cidr=29)
    vm = await world.start(vm)
    assert (vm.address, vm.mac) == ("10.9.0.1", "06:00:0a:09:00:01")
    known = "\n".join(world.census()["known_hosts"])
    assert "10.9.0.1" in known and "172.16.0.3" not in known
    assert [lease.address for lease in world.host.leases.values()] == ["10.9.0.1"]
