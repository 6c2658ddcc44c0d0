"""`banger doctor` as it is typed: rows, exit status, JSON, mending, trials."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.api import results as r
from banger.api.doctor import DoctorRow, TriedLease
from banger.cli.doctor import format_rows
from banger.doctor import deep
from banger.doctor.check import Check, Finding, failed, passed, warned
from banger.doctor.examine import examine, mend
from banger.errors import BangerError
from banger.progress import Silent
from fakes.command_line import CommandLine
from fakes.doctor import FakeWorld, running, vm
from patience import PATIENCE_S


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


def check(name: str, look: Any, **fields: Any) -> Check:
    return Check(name=name, look=look, meaning="", mends="", **fields)


# Running the checks


def test_rows_come_in_the_order_of_the_table_and_checks_run_at_once(world: FakeWorld) -> None:
    meeting = threading.Barrier(2, timeout=PATIENCE_S)

    def look(_: Any) -> Iterator[Finding]:
        meeting.wait()  # ends only where both are looking at the same time
        yield passed("met")

    rows = examine(world, Silent(), [check("b", look), check("a", look)])
    assert [(row.check, row.message) for row in rows] == [("b", "met"), ("a", "met")]


def test_a_check_that_breaks_is_a_row_and_the_others_answer(world: FakeWorld) -> None:
    def broken(_: Any) -> Iterator[Finding]:
        yield passed("never seen")
        raise ValueError("odd")

    rows = examine(world, Silent(), [check("a", broken), check("b", lambda _: [passed("fine")])])
    assert [(row.check, row.level) for row in rows] == [("a", "FAIL"), ("b", "PASS")]
    assert rows[0].message == "this could not be looked at: ValueError: odd"


def test_a_fact_is_found_out_once(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("banger.doctor.world.probe", lambda **_: asked.append(1) or "verdict")
    del world.known["verdict"]
    threads = [threading.Thread(target=world.verdict) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]


# Mending


class Broken:
    """Something that is broken until it is mended."""

    def __init__(self, error: BangerError | None = None) -> None:
        self.whole = False
        self.error = error

    def look(self, _: Any) -> Iterator[Finding]:
        if self.whole:
            yield passed("whole")
        else:
            yield failed("broken", command="banger doctor --fix", fixable=True)

    def fix(self, *_: Any) -> Iterator[str]:
        yield "found the glue"
        if self.error is not None:
            raise self.error
        self.whole = True
        yield "glued it"


def test_mending_says_what_was_done_and_looks_again(world: FakeWorld) -> None:
    thing = Broken()
    checks = [check("thing", thing.look, fix=thing.fix), check("other", lambda _: [passed("ok")])]
    rows = mend(examine(world, Silent(), checks), world, lambda: world, Silent(), checks)
    assert [(row.level, row.fixed) for row in rows] == [
        ("PASS", ("found the glue", "glued it")),
        ("PASS", ()),
    ]


def test_what_could_not_be_mended_keeps_its_level_and_says_why(world: FakeWorld) -> None:
    thing = Broken(BangerError("operation_failed", "the glue is dry"))
    checks = [check("thing", thing.look, fix=thing.fix)]
    (row,) = mend(examine(world, Silent(), checks), world, lambda: world, Silent(), checks)
    assert row.level == "FAIL"
    assert row.fixed == ("found the glue", "could not mend it: the glue is dry")


def test_only_what_is_marked_is_mended(world: FakeWorld) -> None:
    def never(*_: Any) -> Iterator[str]:
        raise AssertionError

    checks = [
        check("fine", lambda _: [passed("ok")], fix=never),
        check("yours", lambda _: [failed("broken", command="mend it yourself")], fix=never),
    ]
    before = examine(world, Silent(), checks)
    assert mend(before, world, lambda: world, Silent(), checks) == before


# Trials


class Line:
    """A daemon that makes a lease and a VM."""

    def __init__(self, network: str = "bridge", error: BangerError | None = None) -> None:
        self.network, self.error = network, error
        self.asked: list[str] = []
        self.tried = 0
        self.params: Any = None

    def call(self, method: str, params: Any, result: type[Any]) -> Any:
        self.asked.append(method)
        if method == "daemon.doctor":
            tried = TriedLease(tap="tap-fc-1", address="172.16.0.254", prepare_ms=4, release_ms=5)
            facts = running(network=self.network, tried=tried if params.try_lease else None)
            self.tried += params.try_lease
            return facts.facts
        return r.Deleted(name="x")

    def stream(self, method: str, params: Any, on_event: Any) -> Any:
        self.asked.append(method)
        self.params = params
        if self.error is not None:
            raise self.error
        on_event({"stage": "disks", "label": "preparing disks"})
        return self

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None: ...

    def result(self, _: Any) -> Any:
        record = vm(vmm="qemu")
        access = r.AgentAccess(
            vm=record, token="", cwd=None, login=True, vmm_pid=1, vmm_start_time=1
        )
        return r.RunResult(vm=record, access=access)

    def fd(self) -> Any:
        import socket

        return socket.socket()


def test_trials_make_and_remove_a_lease_and_a_vm(world: FakeWorld) -> None:
    line = world.line = Line()  # type: ignore[assignment]  # as a daemon's line
    rows = deep.look_deeper(world, Silent())
    assert [(row.check, row.level) for row in rows] == [
        ("trial lease", "PASS"), ("trial VM", "PASS"),
    ]  # fmt: skip
    assert line.asked == ["daemon.doctor", "daemon.doctor", "vm.run", "vm.delete"]
    # Deleted by the daemon, should this process die.
    assert line.params.rm
    assert line.params.create.memory_mib == 512


def test_a_trial_that_fails_is_a_row_with_its_command(world: FakeWorld) -> None:
    error = BangerError("operation_failed", "the guest is silent", hint="banger vm logs x")
    world.line = Line(error=error)  # type: ignore[assignment]
    row = deep.look_deeper(world, Silent())[-1]
    assert (row.level, row.message, row.command) == (
        "FAIL", "the guest is silent", "banger vm logs x",
    )  # fmt: skip


def test_without_a_bridge_there_is_no_lease_to_try(world: FakeWorld) -> None:
    line = world.line = Line(network="user")  # type: ignore[assignment]
    rows = deep.look_deeper(world, Silent())
    assert [row.level for row in rows] == ["PASS", "PASS"]
    assert line.tried == 0


# On paper


def row(level: Any, check: str, message: str, **fields: Any) -> DoctorRow:
    return DoctorRow(check=check, level=level, message=message, **fields)


def test_rows_are_aligned_with_details_and_commands_below() -> None:
    text = format_rows(
        [
            row("PASS", "store", "it can be read", command="never shown"),
            row("FAIL", "disk space", "full", details=("1 of 2",), command="banger vm prune"),
            row("PASS", "x", "mended", fixed=("glued it",)),
        ],
        colored=False,
    )
    assert text == (
        "PASS  store       it can be read\n"
        "FAIL  disk space  full\n"
        "                  1 of 2\n"
        "                  mend it: banger vm prune\n"
        "PASS  x           mended\n"
        "                  fixed: glued it\n"
        "2 passed, 0 warnings, 1 failed\n"
    )


def test_colours_are_for_terminals_only_and_control_characters_for_nobody() -> None:
    rows = [row("WARN", "x", "odd\x1b[31m text")]
    assert "\x1b" not in format_rows(rows, colored=False)
    assert format_rows(rows, colored=True).startswith("\x1b[33mWARN\x1b[0m  x  odd [31m text")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The table of the command, replaced by the test's own."""
    checks: list[Check] = []
    original = examine, mend
    monkeypatch.setattr(
        "banger.doctor.examine.examine", lambda *args: original[0](*args[:2], checks)
    )
    monkeypatch.setattr("banger.doctor.examine.mend", lambda *args: original[1](*args[:4], checks))
    return checks


def test_one_failing_row_is_exit_status_1(cli: CommandLine, made_up: list[Check]) -> None:
    made_up.append(check("a", lambda _: [warned("careful")]))
    assert cli("doctor").status == 0
    made_up.append(check("b", lambda _: [failed("broken", command="mend it")]))
    done = cli("doctor")
    assert (done.status, done.err) == (1, "")
    assert "FAIL  b  broken\n         mend it: mend it\n" in done.out


def test_json_is_a_list_of_rows_with_every_field(cli: CommandLine, made_up: list[Check]) -> None:
    look = warned("careful", "a detail", command="mend it", fixable=True)
    made_up.append(check("a", lambda _: [look]))
    done = cli("doctor", "--json")
    assert done.status == 0
    assert json.loads(done.out) == [
        {
            "check": "a",
            "level": "WARN",
            "message": "careful",
            "details": ["a detail"],
            "command": "mend it",
            "fixable": True,
            "fixed": [],
        }
    ]


def test_fix_mends_from_the_command_line(cli: CommandLine, made_up: list[Check]) -> None:
    thing = Broken()
    made_up.append(check("thing", thing.look, fix=thing.fix))
    done = cli("doctor", "--fix", "-q")
    assert done.status == 0
    assert "fixed: glued it" in done.out


def test_what_takes_long_shows_progress(
    cli: CommandLine, made_up: list[Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.cli.doctor._PATIENCE_S", 0.0)
    shown = threading.Event()

    def look(_: Any) -> Iterator[Finding]:
        assert shown.wait(PATIENCE_S)
        yield passed("done")

    from banger.cli import doctor

    attach = doctor._Progress.attach

    def attached(self: Any, painter: Any) -> None:
        attach(self, painter)
        shown.set()

    monkeypatch.setattr(doctor._Progress, "attach", attached)
    made_up.append(check("a", look))
    done = cli("doctor")
    assert done.status == 0
    assert done.err == "examine: looking at 1 things\n"


def test_the_real_checks_answer_on_a_host_without_anything(cli: CommandLine) -> None:
    """No daemon, no state: every check says something, none breaks, nothing is made."""
    done = cli("doctor", "--json")
    rows = json.loads(done.out)
    assert not [r for r in rows if "could not be looked at" in r["message"]]
    assert {"store", "daemon", "directories", "config"} <= {r["check"] for r in rows}
    assert not cli.paths.state.exists()
    assert list(cli.paths.runtime.iterdir()) == []
    assert cli.starts == 0
