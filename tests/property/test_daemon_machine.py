"""The whole daemon, as its clients see it, under any order of calls, crashes and failures.

A model walks over the daemon's socket: real server, handlers, rooms, database and processes, over a
fake host and fake VMMs. The daemon is killed in the middle of calls, clients leave, machines die,
the host fails at any step. After every step what `vm list` says must be what the model knows, up to
the ends that the daemon itself called unknown; rows, leases, processes and names must agree; no
task may be left over; and what was written to a VM's disk must be there as long as the VM is.

`test_start_machine.py` walks one level below, over `banger.vm`. With BANGER_SOAK the walks are new
ones, and more.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from banger.api import catalog as c
from banger.api import operations as o
from banger.api import params as p
from banger.api import results as r
from banger.api import sessions as s
from banger.api import workspaces as w
from banger.api.records import VmRecord, Workspace
from banger.daemon import ships, workspaces
from banger.errors import BangerError
from banger.host.vmm_process import is_alive
from banger.rpc import client
from banger.units import MIB
from banger.vm.handles import find_handles
from banger.workspace.export import Exported
from banger.workspace.manifest import Manifest
from banger.workspace.prepare import Preparation, Prepared
from fakes.driver import Boot
from fakes.incarnation import Installation, wait_until
from fakes.transitions import documented
from fakes.world import EMPTY, KERNEL, make_templates
from workspace_kit import commit, make_repository, write

_SOAK = "BANGER_SOAK" in os.environ
_EXAMPLES = 300 if _SOAK else 10
_STEPS = 60 if _SOAK else 35

NAMES = st.sampled_from(["ant", "bee", "cat", "dog", "eel"])
SESSIONS = st.sampled_from(["dev", "test"])
IMAGES = st.sampled_from(["debian", "given", "other"])
BOOTS: st.SearchStrategy[Boot] = st.sampled_from(["ready", "ready", "ready", "dies", "dies_early"])
_POINTS = (
    "host.prepare", "host.prepare.reply", "host.release", "driver.build_launch", "driver.start",
)  # fmt: skip
HANGING = st.sampled_from(["host.prepare", "host.prepare.reply", "driver.start"])
BEGINNING = st.sampled_from(["vm.create", "vm.start"])

# Which point fails after how many passes. Most steps are undisturbed.
Ordered = list[tuple[str, int]]
trouble: st.SearchStrategy[Ordered] = st.one_of(
    st.just([]),
    st.just([]),
    st.lists(st.tuples(st.sampled_from(_POINTS), st.integers(0, 1)), max_size=2),
    st.just([("driver.start", 0), ("host.release", 1)]),
)


class Known(msgspec.Struct, kw_only=True):
    """What the model knows of one VM: the states that it may be in, and what is its own."""

    id: str
    states: frozenset[str]
    written: bytes | None = None
    sessions: set[str] = msgspec.field(default_factory=set)


def _fake_prepare(what: Preparation) -> Prepared:
    """A workspace that arrives when the guest says that its place is there."""
    assert what.guest.stat(what.guest_path) is not None
    repository = what.repository
    workspace = Workspace(
        guest_path=what.guest_path, source=str(repository.root), base_commit=None, branch=None,
        mode=what.options.mode,
    )  # fmt: skip
    manifest = Manifest(
        workspace=workspace, object_format="sha1", files={}, head="", refs={}, texts={},
        boundary=(), tips=(),
    )  # fmt: skip
    return Prepared(manifest=manifest, files=1, bytes=1, sent=1)


def _fake_export(source: Any, send: Any) -> Exported:
    assert source.guest.stat(source.path) is not None
    send(b"patch")
    return Exported(base_commit=None, changed=1, names=("M f",), byte_count=5)


class Life(RuleBasedStateMachine):
    """No rule has a precondition: when a cancellation arrives is not in our hand, and the same walk
    has to draw the same."""

    templates: Path
    repository: Path

    def __init__(self) -> None:
        super().__init__()
        self.banger = Installation(self.templates)
        self.world = self.banger.world
        self.banger.patch.setattr(ships, "prepare", _fake_prepare)
        self.banger.patch.setattr(workspaces, "export_patch", _fake_export)
        self.vms: dict[str, Known] = {}
        self.images = {"debian"}
        assert self.world.census() == EMPTY

    # --- asking -----------------------------------------------------------------------------------

    def ask(
        self, method: str, params: Any, *, ordered: Ordered = [], boot: Boot = "ready",  # noqa: B006
        fd: bool = False,
    ) -> Any:  # fmt: skip
        """The result of a call, or its BangerError. Whatever else comes is a bug."""
        for point, after in ordered:
            self.world.faults.fail(point, after=after)
        if boot != "ready":
            self.world.driver.boots.append(boot)
        try:
            if fd:
                return self._with_fd(method, params)
            with (
                client.StreamingCall(self.banger.socket, method, params, lambda _: None)
                if self.streams(method)
                else _Call(self.banger, method, params) as call
            ):
                return call.result(Any)
        except BangerError as e:
            note(f"{method}: {e.outcome}: {e}")
            assert not str(e).count("unexpected "), e
            return e
        finally:
            self.world.faults.clear()
            self.world.driver.boots.clear()

    def streams(self, method: str) -> bool:
        return self.banger.now.server._methods[method].streams

    def _with_fd(self, method: str, params: Any) -> str:
        """An answer with a connection, and what the guest says over it."""
        if self.streams(method):
            with client.StreamingCall(self.banger.socket, method, params, lambda _: None) as call:
                access = call.result(r.RunResult).access
                sock = call.fd()
        else:
            access, sock = client.call_with_fd(self.banger.socket, method, params, r.AgentAccess)
        with sock:
            sock.sendall(b'{"version":1,"method":"health","token":"%s"}\n' % access.token.encode())
            return sock.recv(4096).decode()

    def listed(self) -> dict[str, VmRecord]:
        return {vm.name: vm for vm in self.banger.call("vm.list", {}, list[VmRecord])}

    def learn(self, name: str) -> None:
        """Nobody could say how it ended: what the list says holds, and has to hold from now on."""
        vm = self.listed().get(name)
        if vm is None:
            self.vms.pop(name, None)
            return
        known = self.vms.get(name)
        if known is None or known.id != vm.id:
            known = self.vms[name] = Known(id=vm.id, states=frozenset())
        known.states = frozenset({vm.state})

    def settle(self, name: str, answer: Any, *states: str) -> None:
        """The VM is in one of `states` when the call was done, as before when it failed."""
        if not isinstance(answer, BangerError):
            self.vms[name].states = frozenset(states)
        elif answer.outcome == "unknown":
            self.learn(name)

    def vm(self, name: str) -> Known | None:
        return self.vms.get(name)

    def may_run(self, name: str) -> bool:
        return name in self.vms and "running" in self.vms[name].states

    # --- VMs --------------------------------------------------------------------------------------

    def born(self, name: str, answer: Any, state: str) -> None:
        if not isinstance(answer, BangerError):
            assert name not in self.vms, "two VMs of one name"
            vm = self.listed()[name]
            self.vms[name] = Known(id=vm.id, states=frozenset({state}))
        elif answer.outcome == "unknown":
            assert name not in self.vms
            self.learn(name)
        elif name in self.vms:
            assert answer.code in ("already_exists", "not_found"), answer

    def params(self, name: str, image: str, **changes: Any) -> p.CreateVm:
        return msgspec.structs.replace(self.world.params(name, **changes), image=image)

    @rule(name=NAMES, image=IMAGES, start=st.booleans(), boot=BOOTS, ordered=trouble)
    def create(self, name: str, image: str, start: bool, boot: Boot, ordered: Ordered) -> None:
        answer = self.ask(
            "vm.create", self.params(name, image, start=start), ordered=ordered, boot=boot
        )
        self.born(name, answer, "running" if start else "created")
        if isinstance(answer, BangerError) and image not in self.images:
            assert answer.code in ("not_found", "already_exists"), answer

    @rule(name=NAMES, boot=BOOTS, ordered=trouble, rm=st.booleans())
    def run(self, name: str, boot: Boot, ordered: Ordered, rm: bool) -> None:
        params = p.RunVm(create=self.params(name, "debian"), rm=rm)
        answer = self.ask("vm.run", params, ordered=ordered, boot=boot, fd=True)
        self.born(name, answer, "running")
        if isinstance(answer, str):
            assert f'"hostname": "{name}"' in answer

    @rule(name=NAMES, boot=BOOTS, ordered=trouble, cancel=st.booleans())
    def create_detached(self, name: str, boot: Boot, ordered: Ordered, cancel: bool) -> None:
        for point, after in ordered:
            self.world.faults.fail(point, after=after)
        if boot != "ready":
            self.world.driver.boots.append(boot)
        made = self.banger.stream("vm.create", self.params(name, "debian", detach=True), o.Detached)
        ref = o.OperationRef(id=made.op_id)
        if cancel:
            self.banger.call("daemon.operations.cancel", ref)
        ended = self.banger.stream("daemon.operations.show", ref, o.Operation)
        self.world.faults.clear()
        self.world.driver.boots.clear()
        note(f"detached: {ended.state}")
        self.born(
            name, ended.error.exception() if ended.error is not None else ended.result, "running"
        )

    @rule(name=NAMES, boot=BOOTS, ordered=trouble, again=st.booleans())
    def start(self, name: str, boot: Boot, ordered: Ordered, again: bool) -> None:
        """Start, or restart."""
        method = "vm.restart" if again else "vm.start"
        answer = self.ask(method, p.StartVm(vm=name), ordered=ordered, boot=boot)
        if (known := self.vm(name)) is None:
            assert isinstance(answer, BangerError) and answer.code == "not_found"
            return
        if again and isinstance(answer, BangerError):
            # It was stopped, or that failed already; nobody's files are at stake.
            self.learn(name)
            assert "running" not in known.states or answer.outcome == "unknown", known
        else:
            self.settle(name, answer, "running")

    @rule(name=NAMES, ordered=trouble, how=st.sampled_from(["obeys", "absent", "refuses"]))
    def stop(self, name: str, ordered: Ordered, how: Any) -> None:
        known = self.vm(name)
        if known is not None and (guest := self.world.driver.guests.get(known.id)) is not None:
            guest.shutdown = how
        answer = self.ask("vm.stop", p.StopVm(vm=name), ordered=ordered)
        self.ended(name, answer)

    @rule(name=NAMES, ordered=trouble, signal=st.sampled_from(["KILL", "TERM"]))
    def kill(self, name: str, ordered: Ordered, signal: str) -> None:
        self.ended(name, self.ask("vm.kill", p.KillVm(vm=name, signal=signal), ordered=ordered))

    def ended(self, name: str, answer: Any) -> None:
        if (known := self.vm(name)) is None:
            assert isinstance(answer, BangerError) and answer.code == "not_found"
        elif isinstance(answer, BangerError):
            known.states = frozenset({"error"})
        else:
            known.states = known.states & {"created"} or frozenset({"stopped"})

    @rule(name=NAMES, ordered=trouble)
    def delete(self, name: str, ordered: Ordered) -> None:
        answer = self.ask("vm.delete", p.VmRef(vm=name), ordered=ordered)
        if (known := self.vm(name)) is None:
            assert isinstance(answer, BangerError) and answer.code == "not_found"
        elif isinstance(answer, BangerError):
            known.states = frozenset({"error"})
        else:
            del self.vms[name]

    @rule(name=NAMES, vcpu=st.integers(0, 3), mib=st.integers(60, 130), nat=st.booleans())
    def change(self, name: str, vcpu: int, mib: int, nat: bool) -> None:
        before = self.listed().get(name)
        params = p.SetVm(vm=name, vcpu=vcpu or None, disk_bytes=mib * MIB, nat=nat)
        answer = self.ask("vm.set", params)
        after = self.listed().get(name)
        if before is None or after is None:
            assert before is after is None
        elif isinstance(answer, BangerError):
            assert (before.vcpu, before.nat) == (after.vcpu, after.nat)
        else:
            assert (after.nat, after.work_disk_bytes) == (nat, mib * MIB)
            assert after.work_disk_bytes >= before.work_disk_bytes

    # --- guests -----------------------------------------------------------------------------------

    @rule(name=NAMES)
    def talk(self, name: str) -> None:
        """`vm exec`, as far as the daemon has a part in it."""
        answer = self.ask("vm.connect", p.ConnectVm(vm=name), fd=True)
        if self.may_run(name):
            assert f'"hostname": "{name}"' in answer
        else:
            assert isinstance(answer, BangerError)
            assert answer.code == ("not_running" if name in self.vms else "not_found")

    @rule(name=NAMES, content=st.binary(min_size=1, max_size=16))
    def write(self, name: str, content: bytes) -> None:
        """The guest writes to its disk. It is to be there as long as the VM is."""
        if self.may_run(name):
            disk = self.world.paths.vm(self.vms[name].id).work
            with disk.open("r+b") as f:
                f.seek(MIB)
                f.write(content)
            self.vms[name].written = content

    @rule(
        name=NAMES,
        session=SESSIONS,
        verb=st.sampled_from(["start", "kill"]),
    )
    def session(self, name: str, session: str, verb: str) -> None:
        if verb == "start":
            params: Any = s.StartSession(vm=name, name=session, argv=("sleep", "9"))
        else:
            params = s.KillSession(vm=name, session=session)
        answer = self.ask(f"vm.session.{verb}", params)
        if not self.may_run(name):
            assert isinstance(answer, BangerError)
            return
        known = self.vms[name]
        if verb == "start":
            assert isinstance(answer, BangerError) == (session in known.sessions)
            known.sessions.add(session)
        else:
            assert isinstance(answer, BangerError) == (session not in known.sessions)
        names = {row["name"] for row in self.ask("vm.session.list", p.VmRef(vm=name))}
        assert names == known.sessions

    @rule(name=NAMES)
    def workspace(self, name: str) -> None:
        params = w.PrepareWorkspace(vm=name, path=str(self.repository))
        answer = self.ask("vm.workspace.prepare", params)
        assert isinstance(answer, BangerError) != self.may_run(name)
        if not isinstance(answer, BangerError):
            assert self.listed()[name].workspace is not None

    @rule(name=NAMES)
    def export(self, name: str) -> None:
        params = w.ExportWorkspace(vm=name, guest_path="/root/repo")
        try:
            with client.StreamingCall(
                self.banger.socket, "vm.workspace.export", params, lambda _: None
            ) as call:
                assert b"".join(call.frames()) == b"patch"
        except BangerError as e:
            assert not self.may_run(name), e
            assert e.outcome == "failed", "an export changes nothing"

    # --- images and kernels -----------------------------------------------------------------------

    @rule(name=st.sampled_from(["given", "other"]))
    def register(self, name: str) -> None:
        rootfs = self.world.root / f"{name}.sqfs"
        if not rootfs.exists():
            rootfs.write_bytes(b"hsqs" + os.urandom(8192))
        wanted = c.RegisterImage(name=name, rootfs=str(rootfs), kernel_ref=KERNEL)
        answer = self.ask("image.register", wanted)
        assert isinstance(answer, BangerError) == (name in self.images)
        self.images.add(name)

    @rule(name=st.sampled_from(["given", "other", "absent"]))
    def remove_image(self, name: str) -> None:
        used = {vm.image for vm in self.listed().values()}
        answer = self.ask("image.delete", p.NameRef(name=name))
        assert isinstance(answer, BangerError) == (name in used or name not in self.images), answer
        if not isinstance(answer, BangerError):
            self.images.discard(name)

    @rule()
    def remove_kernel(self) -> None:
        answer = self.ask("kernel.delete", p.NameRef(name=KERNEL))
        assert isinstance(answer, BangerError) and answer.reason == "in_use"

    # --- what goes wrong --------------------------------------------------------------------------

    def hanging(self, name: str, point: str, method: str) -> Iterator[client.StreamingCall]:
        """A create or start that got as far as `point` and stays there, if it gets there at all."""
        reached = self.world.faults.hang_elsewhere(point)
        params = self.params(name, "debian") if method == "vm.create" else p.StartVm(vm=name)
        with self.banger.ask(method, params) as call:
            op_id = call.reply.op_id

            def there() -> bool:
                rows = self.banger.operations()
                return reached.is_set() or any(x.id == op_id and x.done for x in rows)

            wait_until(there)
            if reached.is_set():
                yield call
            else:
                call.channel.close()
        self.world.faults.clear()

    @rule(
        name=NAMES,
        point=HANGING,
        method=BEGINNING,
    )
    def leave(self, name: str, point: str, method: str) -> None:
        """The client leaves in the middle of its call: it is as if it had never asked."""
        was = self.banger.operations()
        for call in self.hanging(name, point, method):
            call.channel.close()
            self.banger.wait_idle()
            (ended,) = [x for x in self.banger.operations() if x not in was]
            assert ended.state == "failed", ended
            return
        self.learn(name)

    @rule(
        name=NAMES,
        point=HANGING,
        method=BEGINNING,
    )
    def crash_in_the_middle(self, name: str, point: str, method: str) -> None:
        """The daemon is killed; the client says that it does not know, and the next daemon does."""
        existed = name in self.vms
        for call in self.hanging(name, point, method):
            self.crash()
            try:
                call.result(Any)
                pytest.fail("nobody was there to answer")
            except BangerError as e:
                assert (e.outcome, e.reason) == ("unknown", "connection_lost")
                shown = self.banger.stream(
                    "daemon.operations.show", o.OperationRef(id=e.op_id or ""), o.Operation
                )
                assert (shown.state, shown.kind, shown.target) == ("unknown", method, name)
            # What it was about is not there now, or it is as it was.
            assert (name in self.listed()) == existed
            return
        self.learn(name)

    @rule(ordered=trouble)
    def crash(self, ordered: Ordered = []) -> None:  # noqa: B006
        """The daemon is killed between two calls."""
        for point, after in ordered:
            self.world.faults.fail(point, after=after)
        try:
            self.banger.crash()
        finally:
            self.world.faults.clear()
        self.learn_of_the_next_daemon()

    @rule()
    def restart_daemon(self) -> None:
        self.banger.restart()
        self.learn_of_the_next_daemon()

    def learn_of_the_next_daemon(self) -> None:
        """It tries again to give back what a VM in error holds, with success or without."""
        for name, known in list(self.vms.items()):
            if known.states == {"error"}:
                self.learn(name)
                assert name in self.vms, "a VM that somebody was told of is gone"
                assert self.vms[name].states <= {"error", "stopped"}

    @rule(name=NAMES, ordered=trouble)
    def machine_dies(self, name: str, ordered: Ordered) -> None:
        if not self.may_run(name):
            return
        known = self.vms[name]
        for point, after in ordered:
            self.world.faults.fail(point, after=after)
        self.world.driver.power_off(known.id, "exit 9")
        wait_until(lambda: self.world.store.find(known.id).state != "running")  # type: ignore[union-attr]
        self.world.faults.clear()
        assert "running" not in self.listed()[name].state
        self.learn(name)
        assert known.states <= {"stopped", "error"}

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def the_list_is_what_the_model_knows(self) -> None:
        listed = self.listed()
        assert set(listed) == set(self.vms)
        for name, vm in listed.items():
            known = self.vms[name]
            assert vm.id == known.id, f"{name} is another VM"
            assert vm.state in known.states, (name, vm.state, known)
            if vm.state != "running":
                known.sessions = set()
        addresses = [vm.address for vm in listed.values()]
        assert len(set(addresses)) == len(addresses)

    @invariant()
    def rows_leases_processes_and_names_agree(self) -> None:
        rows = self.listed()
        running = {vm.id for vm in rows.values() if vm.state == "running"}
        broken = {vm.id for vm in rows.values() if vm.state == "error"}
        assert running <= set(self.world.host.leases) <= running | broken
        census = self.world.census()
        assert set(census["directories"]) == {vm.id for vm in rows.values()}
        assert len(running) <= len(census["processes"]) <= len(running | broken)
        for vm in rows.values():
            handles = find_handles(self.world.paths.vm(vm.id))
            alive = bool(handles and handles.process and is_alive(handles.process))
            assert alive == (vm.id in running) or vm.id in broken, vm
        named = self.banger.now.daemon.names.published()
        assert set(named.values()) >= {vm.address for vm in rows.values() if vm.id in running}
        assert len(named) <= len(running | broken)

    @invariant()
    def nothing_is_under_way(self) -> None:
        self.banger.wait_idle()
        vms = self.banger.now.daemon.vms
        running = {vm.id for vm in self.listed().values() if vm.state == "running"}
        watched = {vm_id for vm_id, task in vms._watchers.items() if not task.done()}
        assert watched == running
        assert not vms._locks and not self.banger.now.daemon.workspace_locks

    @invariant()
    def nobody_lost_a_byte(self) -> None:
        for known in self.vms.values():
            if known.written is not None:
                with self.world.paths.vm(known.id).work.open("rb") as f:
                    f.seek(MIB)
                    assert f.read(len(known.written)) == known.written

    def teardown(self) -> None:
        try:
            for name in list(self.listed()):
                self.banger.call("vm.delete", p.VmRef(vm=name))
            assert self.world.census() == EMPTY
        finally:
            self.banger.close()


class _Call:
    """A call without a stream, used as one with it."""

    def __init__(self, banger: Installation, method: str, params: Any) -> None:
        self._ask = lambda kind: banger.call(method, params, kind)

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None: ...

    def result(self, kind: Any) -> Any:
        return self._ask(kind)


@pytest.mark.timeout(3600 if _SOAK else 600)
def test_daemon_keeps_its_word_whatever_happens() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bd"))
    try:
        Life.templates = make_templates(directory)
        Life.repository = directory / "repository"
        make_repository(Life.repository)
        write(Life.repository, "file", "content")
        commit(Life.repository)
        # Shown with a failure: BANGER_SEED repeats the walks of a soak.
        number = int(os.environ.get("BANGER_SEED") or (secrets.randbits(32) if _SOAK else 0))
        print(f"BANGER_SEED={number}")
        run_machine(
            seed(number)(Life) if _SOAK else Life,
            settings=settings(
                max_examples=_EXAMPLES,
                stateful_step_count=_STEPS,
                deadline=None,
                derandomize=not _SOAK,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        shutil.rmtree(directory)


def test_table_of_states_is_read() -> None:
    assert {("none", "created"), ("created", "running"), ("stopped", "none")} <= documented()
    assert ("stopped", "created") not in documented()
