"""Many calls at once, over real sockets: none waits for another that it has nothing to do with.

Every test has a watchdog: what hangs is shown, task by task.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api import catalog as c
from banger.api import params as p
from banger.api import results as r
from banger.api import workspaces as w
from banger.api.records import VmRecord
from banger.daemon import turns, workspaces
from banger.errors import BangerError
from banger.files import remove_tree
from banger.rpc import client
from banger.vm import create as create_module
from banger.vm import reconcile as reconcile_module
from fakes.incarnation import Installation, installation, wait_until
from fakes.watchdog import watchdog
from fakes.world import EMPTY, KERNEL
from patience import PATIENCE_S

_MANY = 50


@pytest.fixture
def banger(templates: Path) -> Iterator[Installation]:
    with installation(templates) as made:
        with watchdog(PATIENCE_S, made.loops, made.now.kill):
            yield made


class Clients:
    """Threads that ask, as commands in processes of their own would."""

    def __init__(self, banger: Installation) -> None:
        self._banger = banger
        self._pool = ThreadPoolExecutor(max_workers=2 * _MANY)

    def start(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(work, *args)

    def each(self, work: Callable[[str], Any], names: list[str]) -> list[Any]:
        """All at once; their results, or what they raised."""
        started = [self._pool.submit(work, name) for name in names]
        return [future.exception() or future.result() for future in started]

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def clients(banger: Installation) -> Iterator[Clients]:
    made = Clients(banger)
    yield made
    made.close()


def create(banger: Installation, name: str, **changes: Any) -> VmRecord:
    vm = banger.stream("vm.create", banger.world.params(name, **changes), VmRecord)
    assert isinstance(vm, VmRecord)
    return vm


def ask_guest(banger: Installation, name: str) -> str:
    """What `vm exec` does: a connection of its own, and the guest's answer over it."""
    access, sock = client.call_with_fd(
        banger.socket, "vm.connect", p.ConnectVm(vm=name), r.AgentAccess
    )
    with sock:
        sock.sendall(b'{"version":1,"method":"health","token":"%s"}\n' % access.token.encode())
        return sock.recv(4096).decode()


def states(banger: Installation) -> dict[str, str]:
    return {vm.name: vm.state for vm in banger.call("vm.list", {}, list[VmRecord])}


def test_watchdog_shows_what_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def waits_for_ever() -> None:
        await ended.wait()

    with pytest.raises(AssertionError, match="it hung"):
        with watchdog(0.1, lambda: [loop], lambda: loop.call_soon_threadsafe(ended.set)):
            loop.run_until_complete(waits_for_ever())
    loop.close()
    assert "await ended.wait()" in capfd.readouterr().err


def test_removing_large_disks_holds_nobody_up(banger: Installation, clients: Clients) -> None:
    """ext4 takes seconds to unlink a file of many extents."""
    for name in ("web", "db"):
        create(banger, name)
    (web,) = [vm for vm in banger.call("vm.list", {}, list[VmRecord]) if vm.name == "web"]
    reached, go = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        if path.name.startswith(create_module.ASIDE):
            reached.set()
            assert go.wait(PATIENCE_S)
        remove_tree(path)

    banger.patch.setattr(create_module, "remove_tree", slow)
    banger.patch.setattr(reconcile_module, "remove_tree", slow)
    deleting = clients.start(lambda: banger.call("vm.delete", p.VmRef(vm="web"), r.Deleted))
    try:
        assert reached.wait(10)
        assert states(banger) == {"db": "running"}
        again = create(banger, "web")
        assert (again.state, again.id != web.id) == ("running", True)
        # Whoever looks for what is left over meanwhile does not take it away from under the delete.
        banger.call("daemon.doctor", p.Doctor(sweep=True), Any)
        assert not deleting.done()
    finally:
        go.set()
    assert deleting.result(PATIENCE_S).name == "web"
    assert [path.name for path in banger.world.paths.vms.iterdir() if path.name[0] == "."] == []
    assert states(banger) == {"db": "running", "web": "running"}


# --- distinct VMs ---------------------------------------------------------------------------------


def test_fifty_vms_live_their_lives_at_once(banger: Installation, clients: Clients) -> None:
    names = [f"vm-{number}" for number in range(_MANY)]
    made = clients.each(lambda name: create(banger, name), names)
    assert [vm.name for vm in made] == names
    assert len({vm.address for vm in made}) == len({vm.id for vm in made}) == _MANY
    assert len(banger.world.census()["processes"]) == _MANY
    answers = clients.each(lambda name: ask_guest(banger, name), names)
    assert all(
        f'"hostname": "{name}"' in answer for name, answer in zip(names, answers, strict=True)
    )
    stopped = clients.each(
        lambda name: banger.call("vm.stop", p.StopVm(vm=name), r.Outcome).vm.state, names
    )
    assert stopped == ["stopped"] * _MANY
    # Half of them are started again while the others go.
    begin, end = names[::2], names[1::2]
    started = [clients.start(banger.stream, "vm.start", p.StartVm(vm=n), r.Outcome) for n in begin]
    deleted = [clients.start(banger.call, "vm.delete", p.VmRef(vm=n), r.Deleted) for n in end]
    assert [future.result().vm.state for future in started] == ["running"] * len(begin)
    assert [future.result().name for future in deleted] == end
    assert states(banger) == dict.fromkeys(sorted(begin), "running")
    clients.each(lambda name: banger.call("vm.delete", p.VmRef(vm=name)), begin)
    assert banger.world.census() == EMPTY
    banger.wait_idle()


# --- the same VM ----------------------------------------------------------------------------------


def test_fifty_creates_of_one_name_make_one_vm(banger: Installation, clients: Clients) -> None:
    done = clients.each(lambda _: create(banger, "web"), [""] * _MANY)
    made = [vm for vm in done if isinstance(vm, VmRecord)]
    refused = [e for e in done if isinstance(e, BangerError)]
    assert len(made) == 1
    assert {(e.code, e.outcome) for e in refused} == {("already_exists", "failed")}
    assert states(banger) == {"web": "running"}


def test_calls_on_one_vm_keep_their_order(banger: Installation, clients: Clients) -> None:
    """Fifty starts and stops in any order: each sees a whole VM, and the last one's word holds."""
    vm = create(banger, "web")
    kinds = ["vm.start", "vm.stop", "vm.restart", "vm.kill", "vm.set"] * (_MANY // 5)

    def ask(kind: str) -> Any:
        if kind in ("vm.start", "vm.restart"):
            return banger.stream(kind, p.StartVm(vm="web"), r.Outcome).vm
        if kind == "vm.set":
            return banger.call(kind, p.SetVm(vm="web", vcpu=2), r.SetResult).vm
        params = p.StopVm(vm="web") if kind == "vm.stop" else p.KillVm(vm="web")
        return banger.call(kind, params, r.Outcome).vm

    done = clients.each(ask, kinds)
    assert [x for x in done if not isinstance(x, VmRecord)] == []
    # A machine of this VM began only where no other one was: the host was never asked for a lease
    # that it had given already.
    passed = [point for point in banger.world.faults.passed if point.startswith("host.")]
    held = 0
    for point in passed:
        held += {"host.prepare": 1, "host.release": -1}.get(point, 0)
        assert held in (-1, 0, 1)
        held = max(held, 0)
    banger.wait_idle()
    (now,) = banger.call("vm.list", {}, list[VmRecord])
    assert (now.id, now.vcpu) == (vm.id, 2)
    assert len(banger.world.census()["processes"]) == (1 if now.state == "running" else 0)
    banger.call("vm.delete", p.VmRef(vm="web"))
    assert banger.world.census() == EMPTY


def test_fifty_deletes_of_one_vm_delete_it_once(banger: Installation, clients: Clients) -> None:
    create(banger, "web")
    done = clients.each(lambda _: banger.call("vm.delete", p.VmRef(vm="web"), r.Deleted), [""] * 50)
    assert sum(isinstance(x, r.Deleted) for x in done) == 1
    assert {e.code for e in done if isinstance(e, BangerError)} == {"not_found"}
    assert banger.world.census() == EMPTY
    assert not banger.now.daemon.vms._locks, "a deleted VM leaves no lock"


def test_fifty_commands_at_once_in_one_vm(banger: Installation, clients: Clients) -> None:
    create(banger, "web")
    answers = clients.each(lambda _: ask_guest(banger, "web"), [""] * _MANY)
    assert all('"hostname": "web"' in answer for answer in answers)


@pytest.fixture
def slow_start(banger: Installation) -> Iterator[threading.Event]:
    """Starts wait for this event, with their VM's lock held."""
    ready = threading.Event()
    start = banger.world.driver.start

    async def wait_and_start(*args: Any, **options: Any) -> None:
        await asyncio.to_thread(ready.wait, PATIENCE_S)
        await start(*args, **options)

    banger.patch.setattr(banger.world.driver, "start", wait_and_start)
    yield ready
    ready.set()


def begin_start(banger: Installation, clients: Clients) -> Future[Any]:
    starting = clients.start(banger.stream, "vm.start", p.StartVm(vm="web"), r.Outcome)
    wait_until(lambda: banger.world.host.leases)
    return starting


def test_sizes_that_are_changed_at_once_only_grow(
    banger: Installation, clients: Clients, slow_start: threading.Event
) -> None:
    """Each change is judged against what the VM has when its turn comes, not when it asked."""
    create(banger, "web", start=False)
    starting = begin_start(banger, clients)

    def grow(mib: int) -> Any:
        return banger.call("vm.set", p.SetVm(vm="web", disk_bytes=mib << 20), r.SetResult)

    changes = []
    for number, mib in enumerate((200, 100, 300, 150)):
        changes.append(clients.start(grow, mib))
        wait_until(
            lambda n=number: sum(x.kind == "vm.set" for x in banger.operations()) == n + 1  # type: ignore[misc]
        )
    slow_start.set()
    assert starting.result().vm.state == "running"
    refused = [str(future.exception()) for future in changes if future.exception()]
    assert len(refused) == 2
    assert all("disks only grow" in words for words in refused)
    (vm,) = banger.call("vm.list", {}, list[VmRecord])
    assert vm.work_disk_bytes == 300 << 20


def test_way_out_that_is_opened_during_a_start_is_open_afterwards(
    banger: Installation, clients: Clients, slow_start: threading.Event
) -> None:
    """`vm set --nat` waits for the start, and then looks at a VM that runs."""
    create(banger, "web", start=False)
    starting = begin_start(banger, clients)
    changing = clients.start(banger.call, "vm.set", p.SetVm(vm="web", nat=True), r.SetResult)
    wait_until(lambda: any(row.kind == "vm.set" for row in banger.operations()))
    slow_start.set()
    assert starting.result().vm.state == "running"
    assert changing.result().at_next_start == ()
    (lease,) = banger.world.host.leases
    assert banger.world.host.nat(lease), "the record says that it has a way out"


# --- one that hangs holds nobody up ---------------------------------------------------------------


def everything_else_works(banger: Installation) -> None:
    """A whole life of another VM, and every list."""
    create(banger, "other")
    assert "other" in ask_guest(banger, "other")
    assert banger.call("vm.stop", p.StopVm(vm="other"), r.Outcome).vm.state == "stopped"
    assert banger.stream("vm.start", p.StartVm(vm="other"), r.Outcome).vm.state == "running"
    banger.call("vm.set", p.SetVm(vm="other", vcpu=2))
    for method in ("vm.list", "image.list", "kernel.list", "daemon.status"):
        banger.call(method, {})
    banger.call("vm.show", p.VmRef(vm="other"))
    banger.call("vm.delete", p.VmRef(vm="other"))


@pytest.mark.parametrize("point", ["host.prepare", "host.prepare.reply", "driver.start"])
def test_create_that_hangs_holds_nobody_up(banger: Installation, point: str) -> None:
    reached = banger.world.faults.hang_elsewhere(point)
    with banger.ask("vm.create", banger.world.params("stuck")):
        assert reached.wait(PATIENCE_S)
        everything_else_works(banger)
        assert states(banger) == {"stuck": "created"}
    wait_until(lambda: banger.world.census() == EMPTY)


def test_machine_that_a_stop_has_ended_is_not_said_to_have_ended_by_itself(
    banger: Installation,
) -> None:
    create(banger, "web")
    reached = banger.world.faults.hang_elsewhere("host.release")

    def ask() -> None:
        with contextlib.suppress(BangerError):
            banger.call("vm.stop", p.StopVm(vm="web"))

    asking = threading.Thread(target=ask)
    asking.start()
    assert reached.wait(PATIENCE_S)
    shown = banger.call("vm.show", p.VmRef(vm="web"), VmRecord)
    assert (shown.state, shown.last_error) == ("stopped", None)
    banger.crash()
    asking.join(PATIENCE_S)


def test_release_that_hangs_holds_up_no_list(banger: Installation, clients: Clients) -> None:
    """The machine ended by itself, and the helper does not come back from giving its tap back."""
    vm = create(banger, "web")
    reached = banger.world.faults.hang_elsewhere("host.release")
    banger.world.driver.power_off(vm.id)
    assert reached.wait(PATIENCE_S)
    assert states(banger) == {"web": "stopped"}, "it has ended, whatever is left of it"
    shown = banger.call("vm.show", p.VmRef(vm="web"), VmRecord)
    assert (shown.state, shown.last_error) == ("stopped", "the machine ended by itself (status 0)")
    everything_else_works(banger)
    banger.crash()
    assert states(banger) == {"web": "stopped"}


def test_pull_that_hangs_holds_nobody_up(banger: Installation, clients: Clients) -> None:
    """Another process holds the lock of an image's name: whoever wants that name waits, alone."""
    rootfs = banger.world.root / "given.sqfs"
    rootfs.write_bytes(b"hsqs" + bytes(8192))
    wanted = c.RegisterImage(name="given", rootfs=str(rootfs), kernel_ref=KERNEL)
    banger.stream("image.register", wanted)
    lock = os.open(banger.world.paths.images / ".given.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deleting = clients.start(banger.call, "image.delete", p.NameRef(name="given"), r.Deleted)
        wait_until(lambda: any(row.kind == "image.delete" for row in banger.operations()))
        everything_else_works(banger)
        assert not deleting.done()
    finally:
        os.close(lock)
    assert deleting.result().name == "given"
    assert [image["name"] for image in banger.call("image.list", {})] == ["debian"]


def test_wait_for_the_lock_of_a_name_can_be_given_up(banger: Installation) -> None:
    """Trap 16.27."""
    rootfs = banger.world.root / "given.sqfs"
    rootfs.write_bytes(b"hsqs" + bytes(8192))
    lock = os.open(banger.world.paths.images / ".given.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = c.RegisterImage(name="given", rootfs=str(rootfs), kernel_ref=KERNEL)
        with banger.ask("image.register", wanted):
            wait_until(lambda: any(row.kind == "image.register" for row in banger.operations()))
        banger.wait_idle()
    finally:
        os.close(lock)
    assert [image["name"] for image in banger.call("image.list", {})] == ["debian"]


def test_image_that_a_vm_is_being_made_of_is_not_deleted_under_it(
    banger: Installation, clients: Clients
) -> None:
    """Fifty creates against fifty deletes of their image: no VM is left without one."""
    rootfs = banger.world.root / "given.sqfs"
    rootfs.write_bytes(b"hsqs" + bytes(8192))
    wanted = c.RegisterImage(name="given", rootfs=str(rootfs), kernel_ref=KERNEL)
    for turn in range(5):
        banger.stream("image.register", wanted)

        def create_or_delete(word: str, turn: int = turn) -> Any:
            if word == "delete":
                return banger.call("image.delete", p.NameRef(name="given"), r.Deleted)
            params = banger.world.params(f"vm-{turn}-{word}", start=False)
            return banger.stream("vm.create", _of(params, "given"), VmRecord)

        words = [w for n in range(8) for w in (str(n), "delete")]
        clients.each(create_or_delete, words)
        images = {image["id"] for image in banger.call("image.list", {})}
        vms = banger.call("vm.list", {}, list[VmRecord])
        assert {vm.image_id for vm in vms} <= images
        for vm in vms:
            banger.call("vm.delete", p.VmRef(vm=vm.id))
        if len(images) > 1:
            banger.call("image.delete", p.NameRef(name="given"))


def _of(params: p.CreateVm, image: str) -> p.CreateVm:
    return msgspec.structs.replace(params, image=image)


def test_guests_that_take_no_files_hold_nobody_up(banger: Installation, clients: Clients) -> None:
    """Work on a guest's files is a thread that waits for the guest: fifty of them are no end."""
    names = [f"vm-{number}" for number in range(12)]
    clients.each(lambda name: create(banger, name), names)
    waiting = threading.Semaphore(0)
    go = threading.Event()

    def stuck(*_: Any) -> Any:
        waiting.release()
        go.wait(PATIENCE_S)
        raise BangerError("operation_failed", "the guest has gone")

    banger.patch.setattr(workspaces, "export_patch", stuck)
    exports = [clients.start(_export, banger, name) for name in names]
    try:
        for _ in names:
            assert waiting.acquire(timeout=PATIENCE_S), "an export waits for another VM's"
        everything_else_works(banger)
    finally:
        go.set()
    assert {str(future.exception()) for future in exports} == {"the guest has gone"}


def _export(banger: Installation, name: str) -> Any:
    return banger.stream("vm.workspace.export", w.ExportWorkspace(vm=name, guest_path="/root/x"))


def test_stop_does_not_wait_for_an_export(banger: Installation, clients: Clients) -> None:
    """Trap 16.51: the VM's lock is not held while its guest works for somebody."""
    create(banger, "web")
    reached, go = threading.Event(), threading.Event()

    def slow(*_: Any) -> Any:
        reached.set()
        go.wait(PATIENCE_S)
        raise BangerError("operation_failed", "the guest has gone")

    banger.patch.setattr(workspaces, "export_patch", slow)
    exporting = clients.start(_export, banger, "web")
    try:
        assert reached.wait(PATIENCE_S)
        second = clients.start(_export, banger, "web")  # waits for the first, on its own
        assert banger.call("vm.stop", p.StopVm(vm="web"), r.Outcome).vm.state == "stopped"
    finally:
        go.set()
    for future in (exporting, second):
        assert isinstance(future.exception(), BangerError)


def test_export_whose_client_was_stopped_gives_its_turn_to_those_who_wait(
    banger: Installation, clients: Clients
) -> None:
    """Ctrl-Z, or a pager that waits for a key: nobody's trouble until somebody else is waiting."""
    create(banger, "web")
    banger.patch.setattr(turns, "PATIENCE_S", 0.5)
    began: list[str] = []
    poured = threading.Event()

    def pour(source: Any, out: Callable[[bytes], object]) -> Any:
        began.append(source.path)
        if source.path == "/root/first":
            while True:
                out(b"x" * (1 << 16))
                poured.set()
        raise BangerError("not_found", "no such directory")

    banger.patch.setattr(workspaces, "export_patch", pour)
    stopped = client.connect(banger.socket)
    params = {"vm": "web", "guest_path": "/root/first"}
    stopped.write_document({"version": 1, "method": "vm.workspace.export", "params": params})
    try:
        assert poured.wait(10)
        wait_until(lambda: bool(banger.operations()))
        second = clients.start(_export, banger, "web")
        error = second.exception(PATIENCE_S)
        assert isinstance(error, BangerError) and error.code == "not_found"
        assert began == ["/root/first", "/root/x"]
        wait_until(lambda: not banger.now.daemon.workspace_locks)
    finally:
        stopped.close()
