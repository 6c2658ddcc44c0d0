"""The smoke runner's own pieces: its report, its scenario list, the nested host's sources."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.smoke import run
from tests.smoke.scenarios import SCENARIOS
from tools.steps import ROOT

if TYPE_CHECKING:
    from pathlib import Path


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
    assert names == [scenario.name for scenario in SCENARIOS]


def test_an_unknown_scenario_is_wrong_usage() -> None:
    done = _runner("--scenario", "uname,nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_the_scenarios_that_want_to_be_alone_come_last() -> None:
    kinds = [scenario.kind for scenario in SCENARIOS]
    assert kinds == sorted(kinds, key="global".__eq__)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run.Report:
    monkeypatch.setattr(run, "OUTPUT", tmp_path)
    return run.Report()


def _feed(report: run.Report, *lines: str) -> None:
    for line in lines:
        report.feed(line)


def test_a_failed_scenario_shows_its_own_log_only(
    report: run.Report, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _feed(
        report,
        '@event {"start": "one"}',
        "words of one",
        '@event {"end": "one", "result": "pass", "seconds": 1.5}',
        '@event {"start": "two"}',
        "words of two",
        '@event {"end": "two", "result": "fail", "seconds": 2}',
    )
    assert capsys.readouterr().out == "PASS one (1.5 s)\nFAIL two (2 s)\n    words of two\n"
    assert (tmp_path / "two.log").read_text() == "words of two\n"
    assert run._conclude(report, ["one", "two"], 4) == 1


def test_a_host_that_ends_early_is_a_failure_with_its_last_words(
    report: run.Report, capsys: pytest.CaptureFixture[str]
) -> None:
    _feed(report, "modprobe: FATAL")
    assert run._conclude(report, ["one"], 4) == 1
    out = capsys.readouterr().out
    assert "    modprobe: FATAL" in out
    assert "1 not run" in out


def test_a_sole_skipped_scenario_has_its_own_status(report: run.Report) -> None:
    _feed(report, '@event {"end": "one", "result": "skip", "seconds": 0}')
    assert run._conclude(report, ["one"], 1) == 77
