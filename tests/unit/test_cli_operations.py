"""`banger daemon operations`, `vm create --detach`, and the words for what nobody knows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from banger.api import operations as o
from banger.api.envelope import WireError
from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.rpc import client
from banger.rpc.server import Call
from fakes.command_line import CommandLine
from fakes.daemon import FakeDaemon, running_daemon

Serve = Callable[..., FakeDaemon]

RUNNING = o.Operation(
    id="op-00aa11", kind="vm.create", target="web", state="running", stage="disks",
    label="preparing disks", started_at="2026-01-02T03:04:05.678Z",
)  # fmt: skip
DONE = o.Operation(
    id="op-00aa12", kind="vm.stop", target="db", state="done",
    started_at="2026-01-02T03:04:06.678Z", ended_at="2026-01-02T03:04:07.678Z",
)  # fmt: skip
UNKNOWN = o.Operation(
    id="op-00aa13", kind="image.pull", target="", state="unknown",
    started_at="2026-01-02T03:04:06.678Z", ended_at="2026-01-02T03:04:07.678Z",
    error=WireError(
        code="operation_failed", message="nobody knows", hint="banger image list",
        reason="connection_lost", outcome="unknown",
    ),
)  # fmt: skip


@pytest.fixture
def serve(cli: CommandLine) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:
        yield lambda answers: stack.enter_context(
            running_daemon(cli.paths.daemon_socket, answers, state=cli.paths.state)
        )


@pytest.mark.parametrize("words", [("operations",), ("operations", "list")])
def test_operations_are_a_table(cli: CommandLine, serve: Serve, words: tuple[str, ...]) -> None:
    serve({"daemon.operations.list": lambda _: [RUNNING, DONE, UNKNOWN]})
    done = cli("daemon", *words)
    assert done.status == 0
    assert done.out.splitlines() == [
        "OPERATION  KIND        TARGET  STATE    STAGE  STARTED",
        "op-00aa11  vm.create   web     running  disks  2026-01-02 03:04:05",
        "op-00aa12  vm.stop     db      done     -      2026-01-02 03:04:06",
        "op-00aa13  image.pull  -       unknown  -      2026-01-02 03:04:06",
    ]
    rows = json.loads(cli("daemon", *words, "--json").out)
    assert [row["state"] for row in rows] == ["running", "done", "unknown"]
    assert rows[2]["error"]["outcome"] == "unknown"


def test_show_tells_progress_and_end(cli: CommandLine, serve: Serve) -> None:
    async def show(call: Call, params: o.OperationRef) -> o.Operation:
        assert params.id == "op-00aa12"
        await call.event({"stage": "disks", "label": "preparing disks", "detail": ""})
        return DONE

    serve({"daemon.operations.show": show})
    done = cli("daemon", "operations", "show", "op-00aa12")
    assert (done.status, done.out, done.err) == (
        0, "vm.stop db: done\n", "disks: preparing disks\n",
    )  # fmt: skip
    done = cli("daemon", "operations", "show", "-q", "--json", "op-00aa12")
    assert (json.loads(done.out)["state"], done.err) == ("done", "")


def test_status_of_show_is_that_of_the_operation(cli: CommandLine, serve: Serve) -> None:
    serve({"daemon.operations.show": lambda _: UNKNOWN})
    done = cli("daemon", "operations", "show", "op-00aa13")
    assert (done.status, done.out) == (1, "image.pull: unknown\n")
    assert done.err == "banger: nobody knows\nhint: banger image list\n"


def test_cancel_succeeds_when_it_was_cancelled(cli: CommandLine, serve: Serve) -> None:
    error = WireError(
        code="operation_failed", message="cancelled", reason="cancelled", outcome="failed"
    )
    answers = [
        o.Operation(id="op-1", kind="vm.create", target="web", state="failed", started_at="",
                    error=error),
        UNKNOWN,
    ]  # fmt: skip
    serve({"daemon.operations.cancel": lambda _: answers.pop(0)})
    assert cli("daemon", "operations", "cancel", "op-00aa11").status == 0
    assert cli("daemon", "operations", "cancel", "op-00aa13").status == 1


def test_detached_create_prints_the_operation(cli: CommandLine, serve: Serve) -> None:
    daemon = serve({"vm.create": lambda _: o.Detached(op_id="op-00aa11")})
    done = cli("vm", "create", "--detach", "--name", "web")
    assert (done.status, done.out) == (0, "op-00aa11\n")
    assert "banger daemon operations show op-00aa11" in done.err
    assert daemon.asked[0][1].detach
    done = cli("vm", "create", "--detach", "-q", "--json")
    assert (json.loads(done.out), done.err) == ({"op_id": "op-00aa11"}, "")


def test_json_of_an_error_tells_failed_from_unknown(cli: CommandLine, serve: Serve) -> None:
    def die(call: Call, _: Any) -> Any:
        call.channel.close()
        raise BangerError("operation_failed", "nobody hears this")

    def refuse(_: Any) -> Any:
        raise BangerError("already_exists", "there is one")

    for answer, outcome in ((die, "unknown"), (refuse, "failed")):
        with running_daemon(cli.paths.daemon_socket, {"vm.create": answer}, state=cli.paths.state):
            done = cli("vm", "create", "--json", "-q", "--name", "web")
        error = json.loads(done.out)["error"]
        assert (done.status, error["outcome"]) == (1, outcome)
    assert error["op_id"].startswith("op-")


def test_interrupt_that_came_too_late_is_told(
    cli: CommandLine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = VmRecord(
        id="0" * 32, name="web", state="running", image_id="", image="", kernel="", vcpu=1,
        memory_mib=1, overlay_bytes=1, work_disk_bytes=1, address="", mac="", network="user",
    )  # fmt: skip
    serve({"vm.create": lambda _: vm})

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.StreamingCall, "result", interrupt)
    done = cli("vm", "create", "-q")
    assert done.status == 130
    lines = done.err.strip().splitlines()
    assert lines[0] == "banger: interrupted"
    assert lines[1].startswith("too late, it is done; see: banger daemon operations show op-")


def test_operations_are_completed_by_their_ids(
    cli: CommandLine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.cli.complete import OPERATION

    serve({"daemon.operations.list": lambda _: [RUNNING, DONE]})
    found = OPERATION.shell_complete(None, None, "op-00aa1")  # type: ignore[arg-type]
    assert [item.value for item in found] == ["op-00aa11", "op-00aa12"]
