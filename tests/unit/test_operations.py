"""How calls end: done, failed, or unknown; and what can be learnt of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.api import operations as o
from banger.api import params as p
from banger.api import results as r
from banger.api import sessions as s
from banger.api.records import VmRecord
from banger.daemon import runs
from banger.errors import BangerError
from banger.rpc import client
from banger.rpc import operations as table
from banger.rpc.operations import Operations
from fakes.incarnation import Installation, installation, wait_until
from fakes.world import EMPTY
from patience import PATIENCE_S


@pytest.fixture
def banger(templates: Path) -> Iterator[Installation]:
    with installation(templates) as made:
        yield made


def create(banger: Installation, name: str = "web", **changes: object) -> VmRecord:
    vm = banger.stream("vm.create", banger.world.params(name, **changes), VmRecord)
    assert isinstance(vm, VmRecord)
    return vm


def the_operation(banger: Installation, kind: str) -> o.Operation:
    (row,) = [row for row in banger.operations() if row.kind == kind]
    return row


# --- the three ends -------------------------------------------------------------------------------


def test_what_was_done_is_known_for_a_while(banger: Installation) -> None:
    create(banger)
    banger.call("vm.stop", p.StopVm(vm="web"))
    rows = [(row.kind, row.target, row.state, row.stage) for row in banger.operations()]
    assert rows == [("vm.create", "web", "done", "publish"), ("vm.stop", "web", "done", "")]


def test_what_has_ended_holds_nothing_of_how_it_was_carried_out(banger: Installation) -> None:
    """Ten minutes of calls would otherwise be ten minutes of tasks with all that they reached."""
    create(banger)
    banger.call("vm.stop", p.StopVm(vm="web"))
    server = banger.now.daemon.server
    assert server is not None
    entries = server.operations._entries.values()
    assert [(entry.kind, entry.task) for entry in entries] == [
        ("vm.create", None),
        ("vm.stop", None),
    ]


def test_what_only_looks_is_not_kept(banger: Installation) -> None:
    banger.call("vm.list", {})
    banger.call("daemon.status", {})
    assert banger.operations() == []


def test_failed_create_is_safe_to_retry_and_says_so(banger: Installation) -> None:
    banger.world.driver.boots.append("dies")
    with pytest.raises(BangerError) as caught:
        create(banger)
    assert caught.value.outcome == "failed"
    row = the_operation(banger, "vm.create")
    assert (row.state, row.error and row.error.outcome) == ("failed", "failed")
    assert create(banger).state == "running"


def test_lost_answer_of_the_helper_is_settled_by_the_rollback(banger: Installation) -> None:
    lost = BangerError("operation_failed", "lost", reason="connection_lost", outcome="unknown")
    banger.world.faults.fail("host.prepare.reply", lost)
    with pytest.raises(BangerError, match="lost") as caught:
        create(banger)
    assert caught.value.outcome == "failed"
    assert banger.world.census() == EMPTY


def test_rollback_that_fails_leaves_it_unknown(banger: Installation) -> None:
    banger.world.faults.fail("driver.start")
    banger.world.faults.fail("host.release", after=1)
    with pytest.raises(BangerError, match="undoing what it held") as caught:
        create(banger)
    assert caught.value.outcome == "unknown"
    assert the_operation(banger, "vm.create").state == "unknown"
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "error"
    banger.call("vm.delete", p.VmRef(vm="web"))
    assert banger.world.census() == EMPTY


def test_guest_that_is_late_is_neither_failed_nor_done(templates: Path) -> None:
    with installation(templates, ready_timeout="1s") as banger:
        banger.world.driver.boots.append("silent")
        with pytest.raises(BangerError) as caught:
            create(banger)
        assert (caught.value.reason, caught.value.outcome) == ("guest_not_ready", "unknown")
        assert banger.call("vm.list", {}, list[VmRecord])[0].state == "running"


def test_stop_that_cannot_give_back_everything_is_no_success(banger: Installation) -> None:
    create(banger)
    banger.world.faults.fail("host.release")
    with pytest.raises(BangerError, match="could not be given back") as caught:
        banger.call("vm.stop", p.StopVm(vm="web"))
    assert (caught.value.outcome, caught.value.hint) == ("failed", "banger vm kill web")
    assert banger.call("vm.stop", p.StopVm(vm="web"), r.Outcome).vm.state == "stopped"


def test_agent_that_does_not_answer_leaves_a_session_unknown(banger: Installation) -> None:
    vm = create(banger)
    guest = banger.world.driver.guests[vm.id]
    guest.mute = True
    asked = s.StartSession(vm="web", name="dev", argv=("sleep", "9"))
    with pytest.raises(BangerError) as caught:
        banger.call("vm.session.start", asked)
    assert (caught.value.reason, caught.value.outcome) == ("connection_lost", "unknown")
    with pytest.raises(BangerError) as caught:
        banger.call("vm.session.list", p.VmRef(vm="web"))
    assert caught.value.outcome == "failed", "it changes nothing"
    guest.mute, guest.shutdown = False, "absent"
    with pytest.raises(BangerError) as caught:
        banger.call("vm.session.start", asked)
    assert caught.value.outcome == "failed", "it was never asked"


# --- a connection that is lost --------------------------------------------------------------------


def test_daemon_that_is_killed_leaves_its_client_and_its_successor_honest(
    banger: Installation,
) -> None:
    reached = banger.world.faults.hang_elsewhere("host.prepare.reply")
    with banger.ask("vm.create", banger.world.params("web")) as call:
        assert reached.wait(PATIENCE_S)
        banger.crash()
        with pytest.raises(BangerError) as caught:
            call.result(VmRecord)
    lost = caught.value
    assert (lost.outcome, lost.reason, lost.hint) == (
        "unknown",
        "connection_lost",
        "banger vm list",
    )
    assert "the VM web may or may not have been created" in lost.message
    assert f"banger daemon operations show {lost.op_id}" in lost.message
    shown = banger.stream(
        "daemon.operations.show", o.OperationRef(id=lost.op_id or ""), o.Operation
    )
    assert (shown.kind, shown.target, shown.state) == ("vm.create", "web", "unknown")
    assert banger.call("vm.list", {}) == []
    assert banger.world.census() == EMPTY


def test_call_without_stream_knows_its_operation_too(banger: Installation) -> None:
    vm = create(banger)
    banger.world.driver.guests[vm.id].shutdown = "ignores"
    errors: list[BangerError] = []

    def stop() -> None:
        try:
            banger.call("vm.stop", p.StopVm(vm="web"))
        except BangerError as e:
            errors.append(e)

    stopping = threading.Thread(target=stop)
    stopping.start()
    wait_until(lambda: "shutdown" in banger.world.driver.guests[vm.id].asked)
    banger.crash()
    stopping.join()
    (lost,) = errors
    assert lost.outcome == "unknown"
    assert "the VM web may or may not have been stopped" in lost.message
    assert the_operation(banger, "vm.stop").id == lost.op_id
    assert the_operation(banger, "vm.stop").state == "unknown"
    # It was not, as `vm list` says, and stopping again is what helps.
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "running"


def lost_at(tmp_path: Path, method: str, *, read: bool) -> BangerError:
    """The error of a call to a peer that closes before (`read` false) or after it has read."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def peer() -> None:
            connection, _ = listener.accept()
            with connection:
                if read:
                    connection.recv(1 << 16)
                else:
                    connection.shutdown(socket.SHUT_RD)

        thread = threading.Thread(target=peer)
        thread.start()
        params = p.VmRef(vm="x" * (1 << 19))  # more than a socket buffers, if nobody reads
        with pytest.raises(BangerError) as caught:
            client.call(path, method, p.VmRef(vm="web") if read else params, dict)
        thread.join()
    return caught.value


def test_request_that_never_left_is_safe_to_repeat(tmp_path: Path) -> None:
    lost = lost_at(tmp_path, "vm.delete", read=False)
    assert (lost.outcome, lost.reason) == ("failed", "connection_lost")
    assert "safe to try again" in lost.message


def test_request_that_was_read_may_have_happened(tmp_path: Path) -> None:
    lost = lost_at(tmp_path, "vm.delete", read=True)
    assert lost.outcome == "unknown"
    assert "the VM web may or may not have been deleted" in lost.message


def test_question_without_an_answer_is_safe_to_repeat(tmp_path: Path) -> None:
    lost = lost_at(tmp_path, "vm.show", read=True)
    assert lost.outcome == "failed"
    assert "safe to try again" in lost.message


def test_daemon_that_ends_in_order_says_that_it_gave_everything_back(banger: Installation) -> None:
    reached = banger.world.faults.hang_elsewhere("driver.start")
    with banger.ask("vm.create", banger.world.params("web")) as call:
        assert reached.wait(PATIENCE_S)
        banger.restart()
        with pytest.raises(BangerError) as caught:
            call.result(VmRecord)
    assert (caught.value.reason, caught.value.outcome) == ("cancelled", "failed")
    assert the_operation(banger, "vm.create").state == "failed"
    assert banger.world.census() == EMPTY


# --- show, cancel, detach -------------------------------------------------------------------------


def test_detached_create_goes_on_alone_and_is_watched_to_its_end(banger: Installation) -> None:
    made = banger.stream("vm.create", banger.world.params("web", detach=True), o.Detached)
    events: list[dict[str, object]] = []
    with client.StreamingCall(
        banger.socket, "daemon.operations.show", o.OperationRef(id=made.op_id), events.append
    ) as call:
        shown = call.result(o.Operation)
    assert (shown.state, shown.target, shown.detached) == ("done", "web", True)
    assert shown.result is not None
    assert shown.result["name"] == "web"
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "running"
    # Its result outlives the daemon.
    banger.crash()
    again = the_operation(banger, "vm.create")
    assert (again.id, again.state, again.result) == (made.op_id, "done", shown.result)


def test_progress_of_an_operation_is_shown_while_it_runs(banger: Installation) -> None:
    reached = banger.world.faults.hang_elsewhere("driver.start")
    made = banger.stream("vm.create", banger.world.params("web", detach=True), o.Detached)
    assert reached.wait(PATIENCE_S)
    row = the_operation(banger, "vm.create")
    assert (row.state, row.stage, row.cancellable) == ("running", "launch", True)
    stages: list[str] = []
    ref = o.OperationRef(id=made.op_id)

    def heard(event: dict[str, object]) -> None:
        stages.append(str(event.get("stage")))
        banger.call("daemon.operations.cancel", ref, o.Operation)

    with client.StreamingCall(banger.socket, "daemon.operations.show", ref, heard) as call:
        ended = call.result(o.Operation)
    assert stages == ["launch"]
    assert (ended.state, ended.error and ended.error.reason) == ("failed", "cancelled")
    assert banger.world.census() == EMPTY


def test_cancel_is_heard_by_the_client_that_waits(banger: Installation) -> None:
    reached = banger.world.faults.hang_elsewhere("driver.start")
    with banger.ask("vm.create", banger.world.params("web")) as call:
        assert reached.wait(PATIENCE_S)
        ref = o.OperationRef(id=call.reply.op_id or "")
        cancelled = banger.call("daemon.operations.cancel", ref, o.Operation)
        assert cancelled.state == "failed"
        with pytest.raises(BangerError, match="given back") as caught:
            call.result(VmRecord)
    assert (caught.value.reason, caught.value.outcome) == ("cancelled", "failed")
    assert banger.world.census() == EMPTY


def test_cancel_that_cannot_give_everything_back_says_so(banger: Installation) -> None:
    reached = banger.world.faults.hang_elsewhere("driver.start")
    made = banger.stream("vm.create", banger.world.params("web", detach=True), o.Detached)
    assert reached.wait(PATIENCE_S)
    banger.world.faults.fail("host.release")
    ended = banger.call("daemon.operations.cancel", o.OperationRef(id=made.op_id), o.Operation)
    assert (ended.state, ended.error and ended.error.reason) == ("unknown", "cancelled")
    assert ended.error is not None
    assert "could not all be given back: undoing what it held" in ended.error.message
    # It is there, and stays over the daemon's restart, until somebody deletes it.
    banger.restart()
    assert [vm.name for vm in banger.call("vm.list", {}, list[VmRecord])] == ["web"]
    banger.call("vm.delete", p.VmRef(vm="web"))
    assert banger.world.census() == EMPTY


def hang_before_the_connection(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A run whose VM is up hangs, and its client has no connection yet; set when it does."""
    reached = threading.Event()

    async def hang(*_: object, **__: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(runs, "answer_with_agent", hang)
    return reached


@pytest.mark.parametrize("rm", [False, True])
def test_run_that_is_cancelled_when_its_vm_runs_leaves_none(
    banger: Installation, monkeypatch: pytest.MonkeyPatch, rm: bool
) -> None:
    """Its client has no connection yet, and hears that everything was given back."""
    reached = hang_before_the_connection(monkeypatch)
    with banger.ask("vm.run", p.RunVm(create=banger.world.params("web"), rm=rm)) as call:
        assert reached.wait(PATIENCE_S)
        assert banger.call("vm.list", {}, list[VmRecord])[0].state == "running"
        assert call.cancel() == ""
    row = the_operation(banger, "vm.run")
    assert (row.state, row.error and row.error.reason) == ("failed", "cancelled")
    assert banger.world.census() == EMPTY


def test_run_whose_vm_cannot_be_given_back_says_so(
    banger: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = hang_before_the_connection(monkeypatch)
    with banger.ask("vm.run", p.RunVm(create=banger.world.params("web"))) as call:
        assert reached.wait(PATIENCE_S)
        banger.world.faults.fail("host.release")
        ref = o.OperationRef(id=call.reply.op_id or "")
        ended = banger.call("daemon.operations.cancel", ref, o.Operation)
    assert (ended.state, ended.error and ended.error.reason) == ("unknown", "cancelled")
    assert ended.error is not None and ended.error.hint == "banger vm list"
    banger.call("vm.delete", p.VmRef(vm="web"))
    assert banger.world.census() == EMPTY


def test_restart_that_is_cancelled_after_the_stop_says_that_the_vm_does_not_run(
    banger: Installation,
) -> None:
    create(banger)
    reached = banger.world.faults.hang_elsewhere("driver.start")
    with banger.ask("vm.restart", p.StartVm(vm="web")) as call:
        assert reached.wait(PATIENCE_S)
        ref = o.OperationRef(id=call.reply.op_id or "")
        ended = banger.call("daemon.operations.cancel", ref, o.Operation)
        with pytest.raises(BangerError, match="VM web was stopped") as caught:
            call.result(r.Outcome)
    assert (ended.state, caught.value.outcome) == ("unknown", "unknown")
    assert (caught.value.reason, caught.value.hint) == ("cancelled", "banger vm start web")
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "stopped"


def test_restart_whose_start_fails_says_that_the_vm_does_not_run(banger: Installation) -> None:
    create(banger)
    banger.world.driver.boots.append("dies")
    with pytest.raises(BangerError, match="VM web was stopped") as caught:
        banger.stream("vm.restart", p.StartVm(vm="web"))
    assert caught.value.outcome == "unknown"
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "stopped"


def test_daemon_that_ends_in_order_says_what_it_could_not_give_back(banger: Installation) -> None:
    reached = banger.world.faults.hang_elsewhere("driver.start")
    with banger.ask("vm.create", banger.world.params("web")) as call:
        assert reached.wait(PATIENCE_S)
        banger.world.faults.fail("host.release")
        banger.restart()
        with pytest.raises(BangerError, match="could not all be given back") as caught:
            call.result(VmRecord)
    assert caught.value.outcome == "unknown"
    assert the_operation(banger, "vm.create").state == "unknown"


def test_stop_cannot_be_cancelled_and_goes_on_without_its_client(banger: Installation) -> None:
    vm = create(banger)
    guest = banger.world.driver.guests[vm.id]
    guest.shutdown = "ignores"
    channel = client.connect(banger.socket)
    request = {"version": 1, "method": "vm.stop", "params": {"vm": "web"}, "op_id": "op-00aaff"}
    channel.write_document(request)
    wait_until(lambda: "shutdown" in guest.asked)
    channel.close()
    ref = o.OperationRef(id="op-00aaff")
    with pytest.raises(BangerError) as caught:
        banger.call("daemon.operations.cancel", ref)
    assert caught.value.reason == "unsupported"
    banger.world.driver.power_off(vm.id)
    assert banger.stream("daemon.operations.show", ref, o.Operation).state == "done"
    assert banger.call("vm.list", {}, list[VmRecord])[0].state == "stopped"


def test_operation_that_nobody_knows_is_not_found(banger: Installation) -> None:
    for method, ask in (
        ("daemon.operations.show", banger.stream), ("daemon.operations.cancel", banger.call),
    ):  # fmt: skip
        with pytest.raises(BangerError) as caught:
            ask(method, o.OperationRef(id="op-123456"))
        assert caught.value.code == "not_found"


def test_refused_detached_create_is_refused_at_once(banger: Installation) -> None:
    with pytest.raises(BangerError) as caught:
        banger.stream("vm.create", banger.world.params("web", detach=True, vcpu=0))
    assert caught.value.code == "bad_request"
    assert the_operation(banger, "vm.create").state == "failed"
    with pytest.raises(BangerError, match="cannot be detached"):
        banger.stream("vm.run", p.RunVm(create=banger.world.params("web", detach=True)))


# --- the table ------------------------------------------------------------------------------------


def test_table_forgets_after_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr(table.time, "time", lambda: now)
    operations = Operations(tmp_path / "journal")
    done = operations.begin("op-000001", "vm.stop", p.StopVm(vm="web"))
    operations.end(done, "done")
    operations.begin("op-000002", "vm.start", p.StartVm(vm="web"))
    now += table.KEPT_S - 1
    assert [row.id for row in operations.list()] == ["op-000001", "op-000002"]
    now += 2
    assert [row.id for row in operations.list()] == ["op-000002"]
    operations.close()


def test_journal_survives_torn_lines_and_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_MOST_KEPT", 3)
    monkeypatch.setattr(table, "_MOST_LINES", 12)
    journal = tmp_path / "journal"
    operations = Operations(journal)
    for number in range(100):
        operations.end(operations.begin("", "vm.stop", p.StopVm(vm=f"vm-{number}")), "done")
    begun = operations.begin("", "vm.create", p.NameRef(name="last"))
    operations.close()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) <= 14
    assert journal.stat().st_mode & 0o777 == 0o600
    journal.write_bytes(b"{torn\n" + b"".join(lines) + b'{"id":"op-ab')
    again = Operations(journal)
    rows = again.list()
    assert [row.target for row in rows][-3:] == ["vm-98", "vm-99", "last"]
    assert (rows[-1].id, rows[-1].state) == (begun.id, "unknown")
    again.close()


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become longer than that; a write stops there, short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 40, -1])
def test_journal_on_a_full_disk_keeps_whole_lines_and_catches_up_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """`room` -1: for all of the line but its newline."""
    monkeypatch.setattr(table.time, "time", lambda: 1_700_000_000.0)
    journal = tmp_path / "journal"
    operations = Operations(journal)
    first = operations.begin("op-000001", "vm.stop", p.StopVm(vm="first"))
    before = journal.read_bytes()
    if room < 0:
        room += len(before)  # the next one is as long
    with room_for(len(before) + room):
        operations.begin("op-000002", "vm.stop", p.StopVm(vm="secnd"))
        assert journal.read_bytes() == before
        operations.begin("op-000003", "vm.stop", p.StopVm(vm="third"))
        assert journal.read_bytes() == before
    operations.end(first, "done")
    operations.begin("op-000004", "vm.stop", p.StopVm(vm="forth"))
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert [line["id"][-1] for line in lines if "kind" in line] == ["1", "2", "3", "4"]
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]
    operations.close()
    again = Operations(journal)
    assert [(row.target, row.state) for row in again.list()] == [
        ("first", "done"), ("secnd", "unknown"), ("third", "unknown"), ("forth", "unknown"),
    ]  # fmt: skip
    again.close()


@given(st.integers(0, 999_999), st.integers(-1, 255))
@settings(max_examples=60, deadline=None)
def test_journal_that_was_cut_or_damaged_anywhere_is_read_as_far_as_it_is_whole(
    millionths: int, value: int
) -> None:
    """`value` is what one byte becomes; -1: the file ends there."""
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory, "journal")
        operations = Operations(journal)
        for number in range(3):
            entry = operations.begin(
                "", "vm.stop", p.StopVm(vm=f"vm-\N{GREEK SMALL LETTER PI}{number}")
            )
            operations.end(entry, "done", result={"name": "\N{SNOWMAN}"})
        operations.close()
        content = bytearray(journal.read_bytes())
        at = len(content) * millionths // 1_000_000
        content[at:] = b"" if value < 0 else bytes([value]) + content[at + 1 :]
        journal.write_bytes(content)
        again = Operations(journal)
        rows = again.list()
        assert len(rows) >= (content[:at].count(b"\n") if value < 0 else 4) // 2
        added = again.begin("", "vm.start", p.StartVm(vm="added"))
        again.close()
        last = Operations(journal)
        assert last.list()[-1].id == added.id and len(last.list()) == len(rows) + 1
        last.close()


def test_journal_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    operations = Operations(tmp_path / "absent" / "journal")
    operations.end(operations.begin("", "vm.stop", p.StopVm(vm="web")), "done")
    assert [row.state for row in operations.list()] == ["done"]


def test_id_of_the_client_is_taken_when_it_is_one(tmp_path: Path) -> None:
    operations = Operations()
    assert operations.begin("op-0000aa", "vm.stop").id == "op-0000aa"
    for wanted in ("op-0000aa", "", "op-1", "op-0000aa\n", "x" * 1000):
        assert operations.begin(wanted, "vm.stop").id not in ("op-0000aa", wanted)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupted(banger: Installation, point: str | None) -> KeyboardInterrupt:
    """A create that Ctrl-C meets at `point`; None: when it is done, and nobody has noticed yet."""
    reached = banger.world.faults.hang_elsewhere(point) if point else None
    with pytest.raises(KeyboardInterrupt) as caught:
        with banger.ask("vm.create", banger.world.params("web")):
            if reached is not None:
                assert reached.wait(PATIENCE_S)
            else:
                wait_until(lambda: banger.operations() and banger.operations()[0].done)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(PATIENCE_S)
    return caught.value


def test_interrupt_rolls_back_and_needs_no_words(banger: Installation) -> None:
    e = interrupted(banger, "driver.start")
    assert getattr(e, "__notes__", []) == []
    assert banger.world.census() == EMPTY


def test_interrupt_that_comes_too_late_says_so(banger: Installation) -> None:
    e = interrupted(banger, None)
    (note,) = e.__notes__
    assert "too late, it is done" in note
    assert banger.world.census()["rows"] == ["web"]


def test_error_on_the_wire_names_its_outcome(banger: Installation) -> None:
    channel = client.connect(banger.socket)
    channel.write_document({"version": 1, "method": "vm.show", "params": {"vm": "web"}})
    line = channel.read_line()
    channel.close()
    assert json.loads(line or b"")["error"]["outcome"] == "failed"


def test_question_under_way_when_the_journal_is_rewritten_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing, so no later daemon may say that it may have happened."""
    journal = tmp_path / "operations.jsonl"
    monkeypatch.setattr(table, "_MOST_LINES", 8)
    operations = Operations(journal)
    question = operations.begin("", "vm.logs", p.VmRef(vm="web"))
    for _ in range(table._MOST_LINES):
        operations.end(operations.begin("", "vm.stop", p.VmRef(vm="web")), "done")
    operations.end(question, "done")
    operations.close()
    again = Operations(journal)
    assert {row.kind for row in again.list()} == {"vm.stop"}
    again.close()
