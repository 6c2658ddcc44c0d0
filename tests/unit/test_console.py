"""Guests' consoles: what a terminal may see of them, and the line that an error quotes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.vm.console import clean, last_line, tail


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain\n", b"plain\n"),
        (b"a\r\nb\rc", b"a\nb\nc"),
        (b"\x1b[31mred\x1b[0m", b"red"),
        (b"\x1b[2J\x1b[1;1Hhome", b"home"),
        (b"\x1b]0;title\x07after", b"after"),
        (b"\x1b]0;title\x1b\\after", b"after"),
        (b"\x1b[?25lhidden", b"hidden"),
        (b"bell\x07 back\x08", b"bell back"),
        (b"tab\tstays", b"tab\tstays"),
        ("ünï".encode(), "ünï".encode()),
        (b"\x1bcreset", b"creset"),
        ("\x9b31mred".encode(), b"31mred"),
        (b"\xc2\x1b[m\x9b31m", b"31m"),
    ],
)
def test_control_sequences_are_removed(raw: bytes, text: bytes) -> None:
    assert clean(raw) == text


@given(st.binary(max_size=200))
def test_nothing_that_a_terminal_acts_on_is_left(raw: bytes) -> None:
    left = clean(raw)
    assert not set(left) & (set(range(0x20)) - {0x09, 0x0A} | {0x7F})
    assert not re.search(rb"\xc2[\x80-\x9f]", left)


@given(st.text())
def test_printable_text_stays_as_it_is(text: str) -> None:
    printable = "".join(c for c in text if c.isprintable()).encode(errors="replace")
    assert clean(printable) == printable


@given(st.binary(max_size=200))
def test_cleaning_twice_changes_nothing_more(raw: bytes) -> None:
    once = clean(raw)
    assert clean(once) == once


def test_tail_has_the_last_lines_without_the_empty_ones(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_bytes(b"one\n\n  \ntwo\nthree\n")
    assert tail(console, 2) == ["two", "three"]
    assert tail(console, 99) == ["one", "two", "three"]
    assert tail(console, 0) == []


def test_tail_begins_where_this_boot_did(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_bytes(b"before\n")
    start = console.stat().st_size
    assert tail(console, 5, start=start) == []
    with console.open("ab") as f:
        f.write(b"now\n")
    assert tail(console, 5, start=start) == ["now"]


def test_tail_of_a_large_console_reads_its_end_only(tmp_path: Path) -> None:
    console = tmp_path / "console"
    with console.open("wb") as f:
        f.truncate(1 << 40)
        f.seek(0, 2)
        f.write(b"the end\n")
    assert tail(console, 1)[-1].endswith("the end")


def test_missing_console_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 5) == []
    assert last_line(tmp_path / "none") == ""


def test_panic_is_quoted_rather_than_what_followed_it(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_bytes(b"boot\nKernel panic - not syncing: why\nRebooting in 1 seconds\n")
    assert last_line(console) == "Kernel panic - not syncing: why"


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_bytes(b"\xff\xfe boot\n")
    assert last_line(console).endswith(" boot")
