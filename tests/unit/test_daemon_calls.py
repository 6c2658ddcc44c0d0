"""The daemon's calls from outside, over its socket: real handlers and rooms, fake host and VMM."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import pytest_asyncio

from banger import __version__
from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.config.settings import Settings
from banger.daemon import daemon as daemon_module
from banger.daemon import ships
from banger.daemon.daemon import Daemon
from banger.daemon.handlers import build_methods
from banger.errors import BangerError
from banger.guest.client import GuestClient
from banger.host import clock
from banger.rpc import client
from banger.rpc.server import Server, current_op
from banger.session import sessions as session_service
from banger.vm import idle
from banger.vm.stop import delete, kill
from banger.vmm.probe import Verdict
from fakes.world import EMPTY, World
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio

T = TypeVar("T")

_CLIENT = """
import sys
import time
from pathlib import Path
from banger.api import params as p, results as r
from banger.rpc import client
create = p.CreateVm(image="debian", name="web", vcpu=1, memory_mib=128,
                    disk_bytes=64 << 20, overlay_bytes=64 << 20)
with client.StreamingCall(Path(sys.argv[1]), "vm.run", p.RunVm(create=create, rm=True),
                          lambda event: None) as call:
    call.result(r.RunResult)
print("runs", flush=True)
sys.stdin.read()
"""


class Running:
    """A daemon over a world; `start` and `stop` as its process would, `crash` as kill -9."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.socket = world.paths.daemon_socket
        self._tasks: list[asyncio.Task[None]] = []
        # Clients block: in the loop's own pool they would take the daemon's threads.
        self._clients = ThreadPoolExecutor(max_workers=16)

    async def start(self) -> None:
        settings = Settings(dns_listen_addr="127.0.0.1:0")
        self.daemon = Daemon(self.world.paths, self.world.host, settings)  # type: ignore[arg-type]  # as Host
        server = Server(
            self.socket, build_methods(self.daemon), owner_uid=os.geteuid(), version=__version__
        )
        ready = asyncio.Event()
        self._tasks.append(asyncio.ensure_future(self.daemon.run(server, ready.set)))
        await ready.wait()

    async def stop(self) -> None:
        self.daemon.stopping.set()
        await asyncio.gather(*self._tasks)
        self._tasks.clear()
        self._clients.shutdown()
        self._clients = ThreadPoolExecutor(max_workers=16)

    async def client(self, work: Callable[[], T]) -> T:
        """What a command would do in a process of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._clients, work)

    async def call(self, method: str, params: Any, kind: Any = Any) -> Any:
        return await self.client(lambda: client.call(self.socket, method, params, kind))

    async def stream(self, method: str, params: Any, kind: Any = Any) -> Any:
        """The result and the stages that were told on the way."""

        def work() -> Any:
            events: list[dict[str, Any]] = []
            with client.StreamingCall(self.socket, method, params, events.append) as call:
                return call.result(kind), [e["stage"] for e in events if "stage" in e]

        return await self.client(work)

    async def create(self, name: str = "web", **changes: Any) -> VmRecord:
        vm, _ = await self.stream("vm.create", self.world.params(name, **changes), VmRecord)
        assert isinstance(vm, VmRecord)
        return vm


@pytest_asyncio.fixture
async def banger(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    verdict = Verdict(
        driver="firecracker", accel="kvm", kvm_usable=True, kvm_kind="works", evidence=(),
        problems=(), firecracker=None, qemu=None, vhost_vsock=False, tsc_khz=None,
    )  # fmt: skip
    monkeypatch.setattr(daemon_module, "probe", lambda **_: verdict)
    monkeypatch.setattr(daemon_module, "choose_driver", lambda *_, **__: world.driver)
    world.paths.config_file.write_text(
        'disk_reserve = "1M"\nmemory_budget_percent = 95\nready_timeout = "30s"\n'
        'stop_timeout = "30s"\n'
    )
    running = Running(world)
    await running.start()
    yield running
    await running.stop()


def swapped(open_it: Any, first: Any, *, when: bool) -> Any:
    """`GuestClient.open`, which for the first call of a client, if at all, is something else."""
    turns = [first] if when else []

    async def opened(client: GuestClient, **options: Any) -> Any:
        if turns and current_op.get():  # not the daemon's own look
            await turns.pop()()
        return await open_it(client, **options)

    return opened


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_life_of_a_vm_from_create_to_delete(banger: Running) -> None:
    vm = await banger.create()
    assert (vm.state, [v.name for v in await banger.call("vm.list", {}, list[VmRecord])]) == (
        "running", ["web"],
    )  # fmt: skip
    outcome = await banger.call("vm.stop", p.StopVm(vm="web"), r.Outcome)
    assert (outcome.vm.state, outcome.note) == ("stopped", None)
    outcome, stages = await banger.stream("vm.start", p.StartVm(vm=vm.id[:6]), r.Outcome)
    assert outcome.vm.state == "running"
    assert stages[-1] == "publish"
    outcome, stages = await banger.stream("vm.restart", p.StartVm(vm="web"), r.Outcome)
    assert (outcome.vm.state, stages[0]) == ("running", "stop")
    assert await banger.call("vm.delete", p.VmRef(vm="web"), r.Deleted) == r.Deleted(name="web")
    assert banger.world.census() == EMPTY


async def test_start_of_a_running_vm_is_no_error(banger: Running) -> None:
    await banger.create()
    outcome, _ = await banger.stream("vm.start", p.StartVm(vm="web"), r.Outcome)
    assert outcome.note == "VM web is running already"


async def test_looking_into_a_guest(banger: Running) -> None:
    await banger.create()
    health = await banger.call("vm.health", p.VmRef(vm="web"))
    assert health["hostname"] == "web"
    ssh, inside = await banger.call("vm.ports", p.VmRef(vm="web"), list[r.PortRow])
    assert (ssh.reachable, ssh.endpoint) == (True, "web.vm:22")
    assert (inside.reachable, inside.process) == (False, "a?[")
    access = await banger.call("vm.ssh", p.VmRef(vm="web"), r.SshAccess)
    assert (access.sshd, access.address) == (True, "172.16.0.2")
    assert Path(access.key).exists()
    stats = await banger.call("vm.stats", p.VmRef(vm="web"), r.VmStats)
    assert stats.vmm_rss_bytes > 0
    assert stats.guest is None
    assert "stats" in (stats.guest_error or "")


@pytest.mark.parametrize("method", ["vm.health", "vm.ports", "vm.stats", "vm.connect", "vm.ssh"])
async def test_guest_of_a_stopped_vm_cannot_be_asked(banger: Running, method: str) -> None:
    await banger.create(start=False)
    with pytest.raises(BangerError) as caught:
        await banger.call(method, p.VmRef(vm="web"))
    assert (caught.value.code, caught.value.hint) == ("not_running", "banger vm start web")


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpu": 0}, {"vcpu": 33}, {"memory_mib": 127}, {"memory_mib": 1 << 30},
        {"disk_bytes": 1}, {"disk_bytes": 1 << 50}, {"overlay_bytes": 1}, {"name": "No_Name"},
        {"name": ""}, {"name": "-x"}, {"image": "../x"},
    ],
    ids=str,
)  # fmt: skip
async def test_create_that_cannot_be_is_refused_before_anything_exists(
    banger: Running, changes: dict[str, Any]
) -> None:
    params = msgspec.structs.replace(banger.world.params("web"), **changes)
    with pytest.raises(BangerError) as caught:
        await banger.stream("vm.create", params)
    assert caught.value.code == "bad_request"
    assert banger.world.census() == EMPTY


async def test_image_that_nobody_knows_is_not_found_with_a_near_name(banger: Running) -> None:
    params = banger.world.params("web")
    with pytest.raises(BangerError, match="did you mean 'debian'") as caught:
        await banger.stream("vm.create", msgspec.structs.replace(params, image="debain"))
    assert caught.value.code == "not_found"


async def test_image_and_kernel_in_use_are_not_deleted(banger: Running) -> None:
    await banger.create(start=False)
    for method, name in (("image.delete", "debian"), ("kernel.delete", "fake-kernel")):
        with pytest.raises(BangerError, match="is used by") as caught:
            await banger.call(method, p.NameRef(name=name))
        assert caught.value.reason == "in_use"


async def test_kernel_that_is_not_there_is_not_to_be_pulled_to_be_removed(banger: Running) -> None:
    with pytest.raises(BangerError, match="there is no kernel 'nope' here") as caught:
        await banger.call("kernel.delete", p.NameRef(name="nope"))
    assert caught.value.hint == "banger kernel list"


async def test_sizes_of_a_running_vm_change_at_its_next_start(banger: Running) -> None:
    await banger.create()
    done = await banger.call("vm.set", p.SetVm(vm="web", vcpu=2, disk_bytes=128 << 20), r.SetResult)
    assert (done.vm.vcpu, set(done.at_next_start)) == (2, {"vcpu", "work_disk_bytes"})
    with pytest.raises(BangerError, match="disks only grow"):
        await banger.call("vm.set", p.SetVm(vm="web", disk_bytes=64 << 20))
    with pytest.raises(BangerError, match="nothing to change"):
        await banger.call("vm.set", p.SetVm(vm="web"))


async def test_logs_come_without_control_sequences(banger: Running) -> None:
    vm = await banger.create()
    console = banger.world.paths.vm(vm.id).console
    console.write_bytes(b"one\r\n\x1b[31mtwo\x1b[0m\x07\n")

    def read(**options: Any) -> bytes:
        params = p.VmLogs(vm="web", **options)
        with client.StreamingCall(banger.socket, "vm.logs", params, lambda _: None) as call:
            return b"".join(call.frames())

    assert await banger.client(read) == b"one\ntwo\n"
    assert await banger.client(lambda: read(tail=1)) == b"two\n"
    assert await banger.client(lambda: read(tail=0)) == b""


async def test_followed_logs_end_with_the_machine(banger: Running) -> None:
    vm = await banger.create()
    seen: list[bytes] = []

    def follow() -> None:
        params = p.VmLogs(vm="web", follow=True)
        with client.StreamingCall(banger.socket, "vm.logs", params, lambda _: None) as call:
            seen.extend(call.frames())

    following = asyncio.ensure_future(banger.client(follow))
    banger.world.driver.power_off(vm.id, "echo first")
    await until(lambda: b"first" in b"".join(seen))
    banger.world.driver.power_off(vm.id, "echo last; exit 0")
    await following
    assert b"".join(seen).endswith(b"last\n")


# --- vm.run ---------------------------------------------------------------------------------------


def run_params(world: World, *, rm: bool = False) -> p.RunVm:
    return p.RunVm(create=world.params("web"), rm=rm)


async def test_run_answers_with_a_connection_to_the_guest(banger: Running) -> None:
    def work() -> tuple[r.RunResult, bytes]:
        params = run_params(banger.world)
        with client.StreamingCall(banger.socket, "vm.run", params, lambda _: None) as call:
            result = call.result(r.RunResult)
            sock = call.fd()
        with sock:
            assert sock.getblocking()
            request = {"version": 1, "method": "health", "token": result.access.token}
            sock.sendall(json.dumps(request).encode() + b"\n")
            return result, sock.recv(4096)

    result, answer = await banger.client(work)
    assert json.loads(answer)["result"]["hostname"] == "web"
    process = banger.world.handles(result.vm).process
    assert process is not None
    assert (result.access.vmm_pid, result.access.vmm_start_time) == (
        process.pid, process.start_time,
    )  # fmt: skip


async def test_client_that_leaves_during_a_run_leaves_nothing(banger: Running) -> None:
    reached = banger.world.faults.hang("driver.start")
    channel = client.connect(banger.socket)
    request = {"version": 1, "method": "vm.run", "params": run_params(banger.world)}
    channel.write_document({**request, "params": msgspec.to_builtins(request["params"])})
    await reached.wait()
    assert banger.world.census()["rows"] == ["web"]
    channel.close()
    await until(lambda: banger.world.census() == EMPTY)


async def test_client_that_leaves_during_a_stop_does_not_stop_the_stop(banger: Running) -> None:
    vm = await banger.create()
    guest = banger.world.driver.guests[vm.id]
    guest.shutdown = "ignores"
    channel = client.connect(banger.socket)
    channel.write_document({"version": 1, "method": "vm.stop", "params": {"vm": "web"}})
    await until(lambda: "shutdown" in guest.asked)
    channel.close()
    banger.world.driver.power_off(vm.id)
    await until(lambda: banger.world.store.resolve("web").state == "stopped")


async def test_run_that_fails_after_its_vm_runs_says_that_it_does(
    banger: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.daemon import runs

    async def fail(*_: Any, **__: Any) -> None:
        raise BangerError("operation_failed", "no connection")

    monkeypatch.setattr(runs, "answer_with_agent", fail)
    with pytest.raises(BangerError, match="VM web was created and still runs"):
        await banger.stream("vm.run", run_params(banger.world))
    assert banger.world.store.resolve("web").state == "running"
    await banger.call("vm.delete", p.VmRef(vm="web"))
    with pytest.raises(BangerError, match="no connection"):
        await banger.stream("vm.run", run_params(banger.world, rm=True))
    assert banger.world.census() == EMPTY


@pytest.mark.parametrize("rm", [False, True])
async def test_run_whose_vm_is_deleted_meanwhile_says_what_failed_and_no_more(
    banger: Running, monkeypatch: pytest.MonkeyPatch, rm: bool
) -> None:
    from banger.daemon import runs

    async def fail(*_: Any, **__: Any) -> None:
        await delete(banger.world.ctx, banger.world.store.resolve("web"), kill_it=True)
        raise BangerError("operation_failed", "no connection")

    monkeypatch.setattr(runs, "answer_with_agent", fail)
    with pytest.raises(BangerError) as failed:
        await banger.stream("vm.run", run_params(banger.world, rm=rm))
    assert (str(failed.value), failed.value.outcome) == ("no connection", "failed")
    assert banger.world.census() == EMPTY


async def test_run_whose_machine_ends_meanwhile_does_not_say_that_it_runs(
    banger: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.daemon import runs

    async def fail(*_: Any, **__: Any) -> None:
        await kill(banger.world.ctx, banger.world.store.resolve("web"), "KILL")
        raise BangerError("operation_failed", "no connection")

    monkeypatch.setattr(runs, "answer_with_agent", fail)
    with pytest.raises(BangerError, match="VM web was created and does not run any more"):
        await banger.stream("vm.run", run_params(banger.world))


async def start_owner(banger: Running) -> subprocess.Popen[bytes]:
    """A process that runs a VM with --rm and then waits."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _CLIENT, str(banger.socket)],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout is not None
    assert await asyncio.to_thread(owner.stdout.readline) == b"runs\n"
    return owner


def end(owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.communicate()


async def test_ephemeral_vm_goes_when_its_command_is_killed(banger: Running) -> None:
    owner = await start_owner(banger)
    assert len(banger.world.census()["processes"]) == 1
    end(owner)
    await until(lambda: banger.world.census() == EMPTY)


async def test_ephemeral_vm_goes_with_its_command_also_after_a_restart_of_the_daemon(
    banger: Running,
) -> None:
    owner = await start_owner(banger)
    await banger.stop()
    await banger.start()
    assert banger.world.store.resolve("web").state == "running"
    end(owner)
    await until(lambda: banger.world.census() == EMPTY)


async def test_ephemeral_vm_whose_command_ended_while_no_daemon_ran_goes_at_the_next_start(
    banger: Running,
) -> None:
    owner = await start_owner(banger)
    await banger.stop()
    end(owner)
    await banger.start()
    await until(lambda: banger.world.census() == EMPTY)


async def test_ephemeral_vm_whose_command_ran_before_a_reboot_goes_whoever_has_its_pid_now(
    banger: Running,
) -> None:
    owner = await start_owner(banger)
    store = banger.world.store
    vm = store.resolve("web")
    assert vm.owner is not None and vm.owner.boot_id
    await banger.stop()
    then = msgspec.structs.replace(vm.owner, boot_id="0b0d3b5e-5d3a-4a5c-8f2e-000000000000")
    store.update(vm.id, owner=then)
    await banger.start()
    await until(lambda: banger.world.census() == EMPTY)
    end(owner)


# --- the daemon's own end -------------------------------------------------------------------------


async def test_vms_outlive_the_daemon(banger: Running) -> None:
    vm = await banger.create()
    before = banger.world.handles(vm)
    await banger.stop()
    assert banger.world.alive(vm)
    await banger.start()
    status = await banger.call("daemon.status", {}, r.DaemonStatus)
    assert (status.vms_running, status.network, status.vmm.driver) == (1, "bridge", "firecracker")
    assert banger.world.handles(vm) == before


async def test_a_damaged_image_keeps_no_daemon_from_its_start(
    banger: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Its VMs run, and want to be stopped, whatever became of an image."""
    await banger.create()
    await banger.stop()
    damaged = banger.world.paths.images / ("d" * 32)
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"schema": 2}')
    await banger.start()
    assert f"reading the image manifest {damaged}" in caplog.text
    await banger.call("vm.stop", p.StopVm(vm="web"))


async def test_shutdown_is_refused_while_somebody_is_served(banger: Running) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(banger.socket))
        with pytest.raises(BangerError, match="under way") as caught:
            await banger.call("shutdown", {}, r.Pong)
        assert caught.value.reason == "in_use"
        assert not banger.daemon.stopping.is_set()


async def test_shutdown_is_answered_before_it_happens(banger: Running) -> None:
    pong = await banger.call("shutdown", {}, r.Pong)
    assert pong.pid == os.getpid()
    await until(lambda: not banger.socket.exists())


async def test_rollback_is_finished_before_the_daemon_ends(banger: Running) -> None:
    reached = banger.world.faults.hang("driver.start")
    channel = client.connect(banger.socket)
    params = msgspec.to_builtins(banger.world.params("web"))
    channel.write_document({"version": 1, "method": "vm.create", "params": params})
    await reached.wait()
    await banger.stop()
    assert banger.world.census() == EMPTY
    channel.close()


async def test_touched_vm_counts_as_used(banger: Running) -> None:
    vm = await banger.create()
    banger.world.store.update(vm.id, touched_at="2026-01-01T00:00:00.000Z")
    touched = await banger.call("vm.touch", p.VmRef(vm="web"), VmRecord)
    assert touched.touched_at >= vm.touched_at


@pytest.mark.parametrize("what", ["prepare", "session", "connect"])
async def test_vm_is_not_stopped_as_unused_under_a_call_that_has_begun(
    banger: Running, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The guest knows nothing of it as long as the host reads a repository, or connects."""
    vm = await banger.create()
    guest = banger.world.driver.guests[vm.id]
    guest.answers["activity"] = {"result": {"streams": 0, "sessions": 0, "ssh": 0}}
    vms = banger.daemon.vms
    stale = vms.store.update(vm.id, touched_at="2026-01-01T00:00:00.000Z")
    stopped: list[bool] = []

    async def look(*_: Any, **__: Any) -> None:
        # The sweep had listed it before the call began, and its turn comes in the middle.
        stopped.append(await idle.stop_if_unused(vms, stale))
        raise BangerError("operation_failed", "far enough")

    monkeypatch.setattr(ships, "inspect", look)
    monkeypatch.setattr(session_service, "start", look)
    monkeypatch.setattr(
        GuestClient, "open", swapped(GuestClient.open, look, when=what == "connect")
    )
    calls = {
        "prepare": ("vm.workspace.prepare", {"vm": "web", "path": "/repo"}),
        "session": ("vm.session.start", {"vm": "web", "name": "s", "argv": ["true"]}),
        "connect": ("vm.connect", {"vm": "web"}),
    }
    method, params = calls[what]
    with pytest.raises(BangerError, match="far enough"):
        await (banger.stream if what == "prepare" else banger.call)(method, params)
    assert stopped == [False]
    assert banger.world.store.resolve("web").state == "running"


async def test_guests_know_the_time_before_a_request_is_answered(
    banger: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await banger.create()
    guest = banger.world.driver.guests[vm.id]
    guest.answers["time"] = {"result": {}}
    awake = clock.read_clocks()
    slept = msgspec.structs.replace(awake, boottime_s=awake.boottime_s + 9000)
    monkeypatch.setattr(banger.daemon.sweeps, "_read_clocks", lambda: slept)
    guest.asked.clear()
    await banger.call("vm.health", p.VmRef(vm="web"))
    assert [m for m in guest.asked if m != "stats"] == ["time", "health"]


async def test_idle_daemon_does_nothing(banger: Running) -> None:
    """No timer: with nothing to serve and no VM that runs, the loop is not woken."""
    await banger.create()
    await banger.call("vm.delete", p.VmRef(vm="web"), r.Deleted)
    loop = asyncio.get_running_loop()
    deadline = time.monotonic() + PATIENCE_S
    # What ends has its turns; a sleep of some time would be a timer itself.
    while timers := [h for h in loop._scheduled if not h.cancelled()]:  # type: ignore[attr-defined]  # of asyncio's base loop
        assert time.monotonic() < deadline, timers
        await asyncio.sleep(0)


async def test_many_calls_at_once_are_all_answered(banger: Running) -> None:
    names = [f"vm-{number}" for number in range(6)]
    made = await asyncio.gather(*(banger.create(name) for name in names))
    assert len({vm.address for vm in made}) == 6
    await asyncio.gather(*(banger.call("vm.delete", p.VmRef(vm=name)) for name in names))
    assert banger.world.census() == EMPTY


async def test_line_that_is_no_request_gets_an_error(banger: Running) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(banger.socket))
        sock.sendall(b"nonsense\n")
        sock.setblocking(False)
        await until(lambda: select.select([sock], [], [], 0)[0])
        assert json.loads(sock.recv(4096))["error"]["code"] == "bad_request"
