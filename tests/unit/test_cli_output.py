"""What people and programs read: errors, progress, tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

from banger.cli.draw import print_json, progress, table
from banger.cli.errors import show_error, warn
from banger.cli.many import each
from banger.errors import BangerError, ErrorCode


@pytest.fixture(autouse=True)
def no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def failure(code: ErrorCode = "not_found", **changes: Any) -> BangerError:
    error = BangerError(code, "there is no VM 'wbe'", hint="banger vm list", **changes)
    error.op_id = "op-3f9c2a"
    return error


def test_error_is_a_sentence_the_operation_and_the_next_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_error(failure(), as_json=False)
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err == (
        "banger: not found: there is no VM 'wbe' (op-3f9c2a)\nhint: banger vm list\n"
    )


def test_error_that_is_a_plain_failure_has_no_label(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(failure("operation_failed"), as_json=False)
    assert capsys.readouterr().err.startswith("banger: there is no VM")


def test_failures_of_a_rollback_follow_the_first_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = failure()
    error.also = ["undoing the lease: no answer", "VM web was created and still runs"]
    show_error(error, as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "  also: undoing the lease: no answer",
        "  also: VM web was created and still runs",
        "hint: banger vm list",
    ]


def test_error_for_programs_is_an_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(failure(reason="gone"), as_json=True)
    text = capsys.readouterr()
    assert text.err == ""
    assert json.loads(text.out) == {
        "error": {
            "code": "not_found",
            "message": "there is no VM 'wbe'",
            "hint": "banger vm list",
            "op_id": "op-3f9c2a",
            "reason": "gone",
            "outcome": "failed",
        }
    }


def test_several_targets_go_on_after_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def action(ref: str) -> str:
        if ref == "bad":
            raise failure()
        return ref

    assert each(["a", "bad", "b", "a"], action, done.append) == 1
    assert done == ["a", "b"]
    assert capsys.readouterr().err.count("there is no VM") == 1
    assert each(["a"], action, done.append) == 0


# --- tables ---------------------------------------------------------------------------------------


def test_table_has_aligned_columns_and_no_trailing_blanks() -> None:
    text = table(("NAME", "STATE"), [("web", "running"), ("a-long-name", "stopped")])
    assert text == "NAME         STATE\nweb          running\na-long-name  stopped\n"


def test_table_without_rows_is_its_head() -> None:
    assert table(("NAME", "STATE"), []) == "NAME  STATE\n"


# --- progress -------------------------------------------------------------------------------------

EVENTS: list[dict[str, Any]] = [
    {"stage": "plan", "label": "planning"},
    {"stage": "lease", "label": "connecting the network", "detail": "tap"},
    {"done": 10, "total": 100},
    {"warning": "disk is slow"},
    {"stage": "ready", "label": "waiting"},
]


def paint(**options: bool) -> None:
    with progress(**options) as painter:
        for event in EVENTS:
            painter(event)


def test_progress_off_a_terminal_is_one_plain_line_a_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paint()
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.splitlines() == [
        "plan: planning",
        "lease: connecting the network (tap)",
        "banger: warning: disk is slow",
        "ready: waiting",
    ]


def test_quiet_progress_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    paint(quiet=True)
    assert capsys.readouterr().err == "banger: warning: disk is slow\n"


def test_verbose_progress_says_how_long_each_stage_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paint(verbose=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("  ")] == ["  plan", "  lease"]


def test_live_progress_takes_no_markup_from_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository's name or a guest's words must not be read as instructions to the drawer."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with progress() as painter:
        painter({"stage": "x", "label": "[/nonsense] [red]", "detail": "[link=x]"})
        painter({"done": 2048, "detail": "[/b]"})
        painter({"warning": "[/b] is odd"})
    assert "[/b] is odd" in capsys.readouterr().err


# --- words of a stranger --------------------------------------------------------------------------

HOSTILE = "a\x1b]0;title\x07b\x9b2Jc\x7f"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("quiet", [False, True])
def test_progress_hands_no_escapes_to_a_terminal(
    live: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Warnings quote registries, repositories and guests; labels name what they were asked for."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    monkeypatch.setenv("TERM", "dumb")
    with progress(quiet=quiet) as painter:
        painter({"stage": "x", "label": HOSTILE, "detail": HOSTILE})
        painter({"done": 1, "total": 2, "detail": HOSTILE})
        painter({"output": HOSTILE})
        painter({"warning": HOSTILE})
    text = capsys.readouterr().err
    assert "warning: a" in text
    assert not set(text) & set("\x1b\x07\x9b\x7f")


def test_warning_of_a_command_hands_no_escapes_to_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warn(f"what became of the tools is not known: {HOSTILE}")
    assert not set(capsys.readouterr().err) & set("\x1b\x07\x9b\x7f")


def test_json_says_everything_and_holds_nothing_that_a_terminal_acts_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_json({"env": HOSTILE, "name": "größe"})
    show_error(BangerError("not_found", HOSTILE), as_json=True)
    text = capsys.readouterr().out
    assert not set(text) & set("\x1b\x07\x9b\x7f")
    assert "größe" in text
    first, end = json.JSONDecoder().raw_decode(text)
    assert first == {"env": HOSTILE, "name": "größe"}
    assert json.loads(text[end:])["error"]["message"] == HOSTILE


def test_table_has_one_line_for_a_row() -> None:
    """A guest's program may have a newline in its name, and would make rows up."""
    text = table(("PORT", "PROCESS"), [("22", "sshd\n80  nginx\t")])
    assert text == "PORT  PROCESS\n22    sshd?80  nginx?\n"


def test_table_hands_no_escapes_to_a_terminal() -> None:
    assert not set(table(("NAME",), [(HOSTILE,)])) & set("\x1b\x07\x9b\x7f")
