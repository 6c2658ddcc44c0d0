"""The smoke runner's own pieces: registry, dealing, report, options."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.smoke import guests, run
from tests.smoke.machine import Machine
from tests.smoke.registry import Deal, Kind, Scenario, all_scenarios, choose
from tests.smoke.report import HostLog, Report
from tools.steps import ROOT

from patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable


def _runner(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.smoke.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_list_needs_nothing_but_the_registry() -> None:
    done = _runner("--list")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [scenario.name for scenario in all_scenarios()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--scenario", "bare_run,nonsense"], "nonsense"),
        (["--scenario", ""], "--scenario"),
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "9"], "--jobs"),
    ],
)
def test_wrong_usage_is_status_2_and_names_what_is_wrong(arguments: list[str], word: str) -> None:
    done = _runner(*arguments)
    assert done.returncode == 2
    assert word in done.stderr


def test_a_chosen_scenario_is_found_whatever_the_order() -> None:
    assert [each.name for each in choose(["vm_kill", "bare_run"])] == ["bare_run", "vm_kill"]


def test_what_takes_figures_is_run_by_name_only() -> None:
    assert not [each for each in choose([]) if each.measured]


def test_the_scenarios_that_want_to_be_alone_come_last() -> None:
    kinds = [each.kind for each in choose([])]
    assert kinds == sorted(kinds, key="global".__eq__)
    finals = [each.final for each in choose([])]
    assert finals == sorted(finals)


def _nothing() -> None:
    pass


def _scenario(number: int, kind: Kind, chain: str | None) -> Scenario:
    return Scenario(name=f"s{number}", kind=kind, description="", run=_nothing, chain=chain)


_KINDS: st.SearchStrategy[tuple[Kind, str | None]] = st.sampled_from(
    [("pure", None), ("pure", "vm"), ("repodir", "repo"), ("global", None)]
)


@given(st.lists(_KINDS, max_size=12))
def test_every_scenario_is_dealt_once_chains_whole_and_global_ones_after_all_others(
    kinds: list[tuple[Kind, str | None]],
) -> None:
    dealt = [_scenario(number, *kind) for number, kind in enumerate(kinds)]
    dealt.sort(key=lambda each: each.kind == "global")
    deal = Deal(dealt)
    units = []
    while unit := deal.take():
        units.append(unit)
    flat = [each for unit in units for each in unit]
    assert sorted(each.name for each in flat) == sorted(each.name for each in dealt)
    assert [each.kind == "global" for each in flat] == sorted(e.kind == "global" for e in flat)
    for chain in ("vm", "repo"):
        holding = [unit for unit in units if any(each.chain == chain for each in unit)]
        assert len(holding) <= 1
        assert [each.name for unit in holding for each in unit] == [
            each.name for each in dealt if each.chain == chain
        ]
    assert deal.take() == []


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path)


def _start(name: str) -> str:
    return f"@event {json.dumps({'start': name})}"


def _end(name: str, result: str, seconds: float) -> str:
    return f"@event {json.dumps({'end': name, 'result': result, 'seconds': seconds})}"


def test_a_failed_scenario_shows_its_own_log_only_whatever_other_hosts_say(
    report: Report, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = HostLog(report, 1), HostLog(report, 2)
    first.feed(_start("one"))
    second.feed(_start("two"))
    first.feed("words of one")
    second.feed("words of two")
    first.feed(_end("one", "pass", 1.5))
    second.feed(_end("two", "fail", 2))
    assert capsys.readouterr().out == "PASS one (1.5 s)\nFAIL two (2 s)\n    words of two\n"
    assert (tmp_path / "two.log").read_text() == "words of two\n"
    assert report.conclude(["one", "two"], 4) == 1


def test_a_host_that_ends_early_is_a_failure_with_its_last_words(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    told = HostLog(report, 1)
    told.feed("modprobe: FATAL")
    told.close(["one"], released=False)
    assert report.conclude(["one"], 4) == 1
    out = capsys.readouterr().out
    assert "FAIL one" in out
    assert "    modprobe: FATAL" in out


def test_a_host_that_never_asked_for_work_shows_why(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    told = HostLog(report, 2)
    told.feed("banger: installing failed")
    told.close([], released=False)
    assert "FAIL host-2" in (out := capsys.readouterr().out)
    assert "    banger: installing failed" in out


def test_a_host_that_had_its_work_ends_in_silence(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    told = HostLog(report, 1)
    told.feed(_start("one"))
    told.feed(_end("one", "pass", 1))
    told.close([], released=True)
    assert capsys.readouterr().out == "PASS one (1 s)\n"


def test_a_host_asks_for_work_by_an_event(report: Report) -> None:
    told = HostLog(report, 1)
    assert not told.feed(_start("one"))
    assert not told.feed(_end("one", "pass", 1))
    assert told.feed('@event {"want": true}')


@pytest.mark.parametrize(
    ("results", "status"),
    [({"a": "pass"}, 0), ({"a": "skip"}, 77), ({"a": "skip", "b": "pass"}, 0), ({"a": "fail"}, 1)],
)
def test_the_status_is_1_for_a_failure_and_77_for_a_sole_skip(
    report: Report, results: dict[str, str], status: int
) -> None:
    for name, result in results.items():
        report.passed_or_failed(name, result, 1, [])
    assert report.conclude(list(results), 1) == status


def test_a_scenario_that_was_never_run_is_a_failure(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    report.passed_or_failed("one", "pass", 1, [])
    assert report.conclude(["one", "two"], 1) == 1
    assert "not run: two" in capsys.readouterr().out


def test_the_number_of_hosts_follows_processors_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def jobs(processors: int, gib: int) -> int:
        monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(processors)))
        sizes: dict[str, int] = {"SC_PHYS_PAGES": gib << 18, "SC_PAGE_SIZE": 4096}
        sysconf: Callable[[str], int] = sizes.__getitem__
        monkeypatch.setattr(run.os, "sysconf", sysconf)
        return run.default_jobs()

    assert jobs(2, 24) == 2
    assert jobs(64, 512) == 8
    assert jobs(16, 9) == 2
    assert jobs(1, 2) == 1


def test_a_host_whose_processor_stands_still_is_known(report: Report, tmp_path: Path) -> None:
    machine = Machine(1, ["sleep", "3600"], Deal([]), report, tmp_path, PATIENCE_S, patience_s=0.5)
    machine.run()
    assert machine.frozen


def test_a_host_that_works_is_not_taken_for_one_that_stands_still(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much a real one gets of a busy machine's processors is not told beforehand."""
    working = Machine(
        1, ["sh", "-c", "while :; do :; done"], Deal([]), report, tmp_path, PATIENCE_S
    )
    deadline = time.monotonic() + PATIENCE_S
    while working._processor_ticks() < 10:
        assert time.monotonic() < deadline
    ticks = itertools.count(step=3)
    monkeypatch.setattr(Machine, "_processor_ticks", lambda _: next(ticks))
    limit = threading.Timer(2, working.stop)
    limit.start()
    working._patience_s = 0.5
    working.run()
    limit.join()
    assert not working.frozen


def test_a_guest_whose_processor_stood_still_is_told_by_another_host(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """
        work() { words=; while [ -z "$words" ]; do read -r words || exit 1; done; }
        for result in frozen pass; do
            echo '@event {"want": true}'; work
            echo "@event {\\"start\\": \\"$words\\"}"
            echo "the words of $words"
            echo "@event {\\"end\\": \\"$words\\", \\"result\\": \\"$result\\", \\"seconds\\": 1}"
        done
        echo '@event {"want": true}'; work
    """
    deal = Deal([_scenario(n, "global", None) for n in (1, 2)])
    machine = Machine(1, ["sh", "-c", script], deal, report, tmp_path, PATIENCE_S)
    machine.run()
    assert machine.frozen
    assert report.results == {"s2": "pass"}
    out = capsys.readouterr()
    assert "FROZEN s1" in out.out and "the words of s1" in out.out
    assert "it has not finished s1" in out.out + out.err
    assert report.conclude(["s1", "s2"], 1) == 1, "nobody else told it"


@pytest.mark.parametrize(
    ("console", "silent_s", "still"),
    [
        ("[    1.9] PCI: Fatal\n", 200, True),
        ("[    1.9] PCI: Fatal\n", 20, False),
        ("[    1.9] PCI: Fatal\nbanger: agent 0.1.0\n", 200, False),
        ("banger: agent 0.1.0\n[ 9.1] reboot: Restarting system\n[ 1.9] PCI\n", 200, True),
        ("banger: agent 0.1.0\n[ 9.1] reboot: Restarting system\n", 200, False),
        ("", 200, False),
    ],
)
def test_a_guest_stands_still_before_our_first_line_only(
    console: str, silent_s: float, still: bool
) -> None:
    assert guests.stands_still(console, silent_s) is still


# A host that is killed when it asks for it, and asks for work again when it is booted anew.
_CUT = """
    work() { words=; while [ -z "$words" ]; do read -r words || exit 1; done; }
    echo '@event {"want": true}'; work
    case $words in
    s1)
        echo '@event {"start": "s1"}'
        echo '@event {"told": 7}'
        echo '@event {"cut": true}'
        exec sleep 60;;
    "again 7 s1")
        echo '@event {"start": "s1"}'
        echo '@event {"end": "s1", "result": "pass", "seconds": 1}'
        echo '@event {"want": true}'; work
        test "$words" = end;;
    esac
"""


def test_a_host_whose_power_was_cut_goes_on_with_its_scenario(
    report: Report, tmp_path: Path
) -> None:
    deal = Deal([_scenario(1, "global", None)])
    machine = Machine(1, ["sh", "-c", _CUT], deal, report, tmp_path, 30)
    machine.run()
    assert report.results == {"s1": "pass"}
    assert report.conclude(["s1"], 1) == 0


def test_a_host_that_does_not_come_back_from_a_cut_is_a_failure(
    report: Report, tmp_path: Path
) -> None:
    script = _CUT.replace(
        '"again 7 s1")', '"again 7 s1") echo no bootable device; exit 1;;\n    x)'
    )
    machine = Machine(1, ["sh", "-c", script], Deal([_scenario(1, "global", None)]), report,
                      tmp_path, 30)  # fmt: skip
    machine.run()
    assert report.conclude(["s1"], 1) == 1
    assert "no bootable device" in (tmp_path / "s1.log").read_text()
