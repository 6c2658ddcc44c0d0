"""Text of guests for a terminal: what is taken out of it, in one piece and in many."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.terminal_text import TerminalText, clean

# Random bytes are hardly ever a sequence.
PARTS = [
    b"a", b"text", b"\r", b"\n", b"\r\n", b"\t", b"\x1b", b"[", b"]", b"0;", b"31", b"m", b"H",
    b"\x07", b"\\", b"\xc2", b"\x9b", b"\x1b[31m", b"\x1b]0;title\x07", b"\xc3\xbc",
    b"\x00", b"\x7f",
]  # fmt: skip
GUEST = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PARTS)).map(b"".join))


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


@pytest.mark.parametrize("part", PARTS)
def test_the_time_that_it_takes_is_that_of_its_length(part: bytes) -> None:
    """A square of a mebibyte would be days."""
    clean(part * ((1 << 20) // len(part)))


@given(GUEST, st.lists(st.integers(0, 200)))
@example(b"\xc2\x9b31m", [1])
@example(b"a\r\nb", [2])
@example(b"\x1b]0;title\x1b\\", [6, 11])
def test_in_pieces_it_is_the_same_as_in_one(raw: bytes, cuts: list[int]) -> None:
    text = TerminalText()
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(edges)]
    assert b"".join(map(text.feed, pieces)) + text.finish() == clean(raw)


@given(GUEST, st.integers(0, 200))
def test_of_sequences_only_colours_stay_on_request(raw: bytes, cut: int) -> None:
    text = TerminalText(colours=True)
    shown = text.feed(raw[:cut]) + text.feed(raw[cut:]) + text.finish()
    left = re.sub(rb"\x1b\[[0-9;]*m", b"", shown)
    assert b"\x1b" not in left
    assert shown == left or shown.endswith(b"\x1b[m")


def test_colours_end_with_the_text() -> None:
    text = TerminalText(colours=True)
    assert text.feed(b"\x1b[1;31mred\x1b[2J") + text.finish() == b"\x1b[1;31mred\x1b[m"
    assert TerminalText(colours=True).finish() == b""


def test_what_never_ends_is_not_held_for_ever() -> None:
    text = TerminalText()
    assert len(text.feed(b"\x1b]0;" + b"x" * 1000)) >= 1000
    assert text.feed(b"y" * 10) == b"y" * 10
