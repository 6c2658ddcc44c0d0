"""Guests' consoles: what a terminal may see of them, and the line that an error quotes."""

from __future__ import annotations

from pathlib import Path

from banger.vm.console import last_line, tail


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
