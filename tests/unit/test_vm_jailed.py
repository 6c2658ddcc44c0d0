"""VMs whose VMM the root helper launches in a jail: start, end, and a launch that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from banger.errors import BangerError
from banger.vm.handles import write_handles
from banger.vm.stop import delete, stop
from fakes.world import EMPTY, World
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def jailed(templates: Path) -> AsyncIterator[World]:
    world = World(templates=templates, jailed=True)
    yield world
    assert world.census() == EMPTY
    await world.close()


async def test_a_jailed_vm_is_launched_by_the_helper_and_reached_in_its_jail(jailed: World) -> None:
    vm = await jailed.create()
    assert jailed.jailing is not None
    root = jailed.jailing.root(vm.id)
    handles = jailed.handles(vm)
    assert handles.process == jailed.host.processes[handles.lease_id or ""]  # type: ignore[index]  # a LeaseId
    assert handles.endpoint.path == str(root / "vsock.sock")  # type: ignore[union-attr]  # vsock
    assert jailed.census()["names"] == ["web"]
    await stop(jailed.ctx, vm)
    assert not root.exists()
    assert jailed.census()["names"] == []
    await delete(jailed.ctx, vm)


async def test_a_daemon_that_comes_back_adopts_a_jailed_vm(jailed: World) -> None:
    vm = await jailed.create()
    await jailed.crash()
    assert jailed.store.resolve("web").state == "running"
    assert jailed.census()["names"] == ["web"]
    await delete(jailed.ctx, vm)


@pytest.mark.parametrize("loss", ["missing", "damaged", "no process"])
async def test_a_jailed_vm_whose_handles_are_lost_is_adopted_by_its_lease(
    jailed: World, loss: str
) -> None:
    """Only the helper sees into a jail: what it launched there is what tells that the VM runs."""
    vm = await jailed.create()
    before, path = jailed.handles(vm), jailed.paths.vm(vm.id).handles
    if loss == "missing":
        path.unlink()
    elif loss == "damaged":
        path.write_bytes(b"{")
    else:
        write_handles(jailed.paths.vm(vm.id), msgspec.structs.replace(before, process=None))
    await jailed.crash()
    assert jailed.store.resolve("web").state == "running"
    assert jailed.handles(vm) == before
    assert jailed.alive(vm)
    await delete(jailed.ctx, vm)


@pytest.mark.parametrize("point", ["host.launch", "host.launch.reply"])
async def test_a_launch_that_fails_or_whose_answer_is_lost_leaves_nothing(
    jailed: World, point: str
) -> None:
    jailed.faults.fail(point)
    with pytest.raises(BangerError):
        await jailed.create()
    assert jailed.census() == EMPTY


async def test_a_daemon_killed_while_the_helper_launches_leaves_nothing(jailed: World) -> None:
    reached = jailed.faults.hang("host.launch.reply")
    jailed.leave(jailed.create())
    async with asyncio.timeout(PATIENCE_S):
        await reached.wait()
    await jailed.crash()
    assert jailed.census() == EMPTY
