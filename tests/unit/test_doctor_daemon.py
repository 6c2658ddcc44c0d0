"""`daemon.doctor` and the world that asks it: facts, sweeping, a tried lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from banger import __version__
from banger.api import params as p
from banger.api.doctor import DoctorFacts
from banger.api.records import VmRecord
from banger.config.settings import Settings, read_settings
from banger.daemon.daemon import Daemon
from banger.daemon.doctor import doctor
from banger.doctor.helper import ask_helper
from banger.doctor.world import World as DoctorWorld
from banger.doctor.world import settings_hash
from banger.errors import BangerError
from banger.host.host import Host
from banger.rpc.server import Call
from banger.vm.cleanup import is_live
from banger.vm.plan import build_lease_plan
from banger.vm.stop import stop
from fakes.daemon import running_daemon
from fakes.doctor import running
from fakes.faults import Faults
from fakes.host import NOBODY, FakeHost
from fakes.world import World

pytestmark = pytest.mark.asyncio

_NOBODY_CALLS = cast(Call, None)


@pytest_asyncio.fixture
async def daemon(world: World) -> AsyncIterator[Daemon]:
    """A daemon over the world of fakes; it listens nowhere."""
    settings = Settings(dns_listen_addr="127.0.0.1:0", memory_budget_percent=95)
    daemon = Daemon(world.paths, cast(Host, world.host), settings)
    daemon.vms = world.ctx
    yield daemon
    daemon.store.close()


async def ask(daemon: Daemon, **params: Any) -> DoctorFacts:
    return await doctor(daemon, _NOBODY_CALLS, p.Doctor(**params))


async def test_facts_tell_of_running_vms_and_their_leases(world: World, daemon: Daemon) -> None:
    web = await world.create()
    idle = await world.create("idle", start=False)
    facts = await ask(daemon)
    assert (facts.version, facts.network) == (__version__, "bridge")
    assert facts.live == facts.busy == (web.id,)
    assert [lease.vm_id for lease in facts.helper.leases] == [web.id]
    assert facts.settings_sha256 == settings_hash(daemon.settings)
    assert idle.id not in facts.live


async def test_without_privilege_the_helper_says_what_is_missing() -> None:
    host = FakeHost(Path("/nowhere"), Faults(), NOBODY)
    facts = await ask_helper(cast(Host, host))
    assert (facts.privilege, facts.problem) == ("none", NOBODY.missing)


async def test_a_helper_that_fails_is_a_fact_too(world: World, daemon: Daemon) -> None:
    world.faults.fail("host.status")
    facts = await ask(daemon)
    assert facts.helper.problem is not None
    assert facts.helper.leases == ()


async def test_looking_gives_nothing_back(world: World, daemon: Daemon) -> None:
    web = await world.create()
    await leave_behind(world, web.id)
    before = world.census()
    await ask(daemon)
    assert world.census() == before


async def leave_behind(world: World, vm_id: str) -> None:
    """What a crash would leave: handles forgotten, a directory and sockets of no VM."""
    stranger = world.paths.vm("ab" * 16)
    stranger.directory.mkdir()
    stranger.runtime.mkdir(parents=True)
    (stranger.runtime / "api.sock").touch()


async def test_a_sweep_gives_back_what_no_vm_uses_and_nothing_else(
    world: World, daemon: Daemon
) -> None:
    web = await world.create()
    gone = await world.create("gone", start=False)
    await leave_behind(world, gone.id)
    (world.paths.vms / "somebody-elses").mkdir()
    await world.host.prepare(build_lease_plan(gone, daemon.settings, jail=False))
    # The row is lost, as after a restored backup; everything else of it is still there.
    world.lose_row(gone)
    facts = await ask(daemon, sweep=True)
    after = world.census()
    assert after["leases"] == [web.id]
    assert after["rows"] == ["web"]
    assert after["directories"] == sorted(["somebody-elses", web.id])
    assert after["sockets"] == [web.id[:12]]
    assert len(after["processes"]) == 1
    assert len(facts.swept) == 2
    assert [lease.vm_id for lease in facts.helper.leases] == [web.id]
    assert facts.undecided == ()


async def test_a_sweep_takes_back_a_machine_that_was_forgotten(
    world: World, daemon: Daemon
) -> None:
    web = await world.create()
    world.ctx.handles.pop(web.id)
    facts = await ask(daemon, sweep=True)
    assert facts.live == (web.id,)
    assert is_live(world.ctx, web)


async def test_what_is_not_to_be_decided_is_a_fact(world: World, daemon: Daemon) -> None:
    web = await world.create()
    await stop(world.ctx, web)
    world.store.delete(web.id)
    facts = await ask(daemon, sweep=True)
    assert [u.command for u in facts.undecided] == [f"rm -r {world.paths.vm(web.id).directory}"]
    assert world.paths.vm(web.id).work.exists()


async def make_unused_lease(world: World, daemon: Daemon, name: str) -> VmRecord:
    """A VM that does not run and holds a lease all the same."""
    vm = await world.create(name, start=False)
    await world.host.prepare(build_lease_plan(vm, daemon.settings, jail=False))
    return vm


async def test_a_lease_of_a_stopped_vm_is_given_back(world: World, daemon: Daemon) -> None:
    await make_unused_lease(world, daemon, "web")
    facts = await ask(daemon, sweep=True)
    assert facts.swept == ("gave back what VM web held, which does not run",)
    assert world.census()["leases"] == []


async def test_a_lease_that_is_just_being_made_is_not_swept(world: World, daemon: Daemon) -> None:
    """The start holds the VM's lock while its lease is there and its handles are not."""
    reached = world.faults.hang("host.prepare.reply")
    starting = world.leave(world.create())
    await reached.wait()
    facts = await ask(daemon, sweep=True)
    assert facts.swept == ()
    assert len(world.host.leases) == 1
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)


async def test_a_lease_that_cannot_be_given_back_is_an_error_and_the_rest_is_done(
    world: World, daemon: Daemon
) -> None:
    for name in ("web", "db"):
        await make_unused_lease(world, daemon, name)
    world.faults.fail("host.release")
    with pytest.raises(BangerError, match="giving back what no VM uses: VM db: releasing"):
        await ask(daemon, sweep=True)
    assert len(world.census()["leases"]) == 1


async def test_a_tried_lease_is_at_the_end_of_the_subnet_and_gone_afterwards(
    world: World, daemon: Daemon
) -> None:
    tried = (await ask(daemon, try_lease=True)).tried
    assert tried is not None
    assert tried.address == "172.16.0.254"
    assert tried.prepare_ms >= 0 and tried.release_ms >= 0
    assert world.census()["leases"] == []


@pytest.mark.parametrize("point", ["host.prepare", "host.prepare.reply"])
async def test_a_lease_whose_answer_is_lost_is_given_back(
    world: World, daemon: Daemon, point: str
) -> None:
    world.faults.fail(point)
    with pytest.raises(BangerError):
        await ask(daemon, try_lease=True)
    assert world.census()["leases"] == []


# The world's side


async def test_the_world_learns_from_a_running_daemon(world: World) -> None:
    facts = running(live=("1" * 32,)).facts
    with running_daemon(
        world.paths.daemon_socket, {"daemon.doctor": lambda _: facts}, state=world.paths.state
    ) as daemon:
        found = await asyncio.to_thread(DoctorWorld(world.paths).daemon)
        assert (found.state, found.facts) == ("up", facts)
        assert daemon.asked == [("daemon.doctor", p.Doctor())]


async def test_no_daemon_is_started_by_looking(world: World) -> None:
    assert DoctorWorld(world.paths).daemon().state == "absent"


async def test_a_daemon_of_another_version_is_there_and_says_why(world: World) -> None:
    with running_daemon(world.paths.daemon_socket, {}, version="9.9.9", state=world.paths.state):
        found = await asyncio.to_thread(DoctorWorld(world.paths).daemon)
    assert found.state == "mute"
    assert "9.9.9" in (found.problem or "")


async def test_without_a_daemon_running_vms_are_known_by_their_processes(world: World) -> None:
    web = await world.create()
    found = DoctorWorld(world.paths)
    assert found.live() == {web.id}
    world.paths.vm(web.id).handles.write_text("damaged")
    assert DoctorWorld(world.paths).live() == frozenset()


async def test_settings_of_one_file_have_one_hash(world: World) -> None:
    world.paths.config_file.write_text("cidr = 25\n[vm_defaults]\nvcpu = 2\n")
    read = [settings_hash(read_settings(world.paths.config_file)) for _ in range(2)]
    assert read[0] == read[1] != settings_hash(Settings())
