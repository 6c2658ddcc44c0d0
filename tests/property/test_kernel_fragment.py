"""Configuration fragments: what is read is what was written, and a `.config` is judged right."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.kernel.fragment import (
    LIMIT_BYTES,
    explain_lost,
    find_lost,
    format_options,
    parse_fragment,
)

NAMES = st.text(string.ascii_uppercase + string.digits + "_", min_size=1, max_size=12)
# Texts hold what prints; a quote or a backslash stands behind a backslash.
TEXTS = st.text(string.ascii_letters + string.digits + r" =#,'\"").map(json.dumps)
VALUES = st.one_of(
    st.none(), st.just("y"), st.integers(-(2**31), 2**32).map(str),
    st.integers(0, 2**64).map(hex), TEXTS,
)  # fmt: skip
OPTIONS = st.dictionaries(NAMES, VALUES, max_size=20)


@given(OPTIONS)
def test_what_is_written_is_read_again(options: dict[str, str | None]) -> None:
    assert parse_fragment(format_options(options), what="it") == options


@given(OPTIONS, st.lists(st.sampled_from(["", "# a remark", "  ", "#CONFIG_X=y"])))
def test_remarks_and_blank_lines_mean_nothing(
    options: dict[str, str | None], remarks: list[str]
) -> None:
    lines = [*remarks, *format_options(options).splitlines(), *remarks]
    assert parse_fragment("\n".join(lines), what="it") == options


@given(OPTIONS, st.data())
def test_exactly_what_differs_is_lost(options: dict[str, str | None], data: st.DataObject) -> None:
    changed = data.draw(st.sets(st.sampled_from(sorted(options)))) if options else set[str]()
    config = {name: value for name, value in options.items() if name not in changed}
    # A lost option is off where it should be on, and the other way round.
    config |= {name: "y" for name in changed if options[name] is None}
    text = format_options({name: value for name, value in config.items() if value is not None})
    assert set(find_lost(options, text)) == changed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CONFIG_X=y\nset X\n", "line 2 is no configuration: set X"),
        ("CONFIG_X\n", "line 1 is no configuration"),
        ('CONFIG_X="open\n', "line 1 is no configuration"),
        ("CONFIG_X=y z\n", "line 1 is no configuration"),
        ("CONFIG_X=m\n", "line 1: CONFIG_X can be y or n, there are no modules"),
        ("CONFIG_X=y\n# CONFIG_X is not set\n", "line 2: CONFIG_X comes a second time"),
        ("#" * (LIMIT_BYTES + 1), "larger than 256 KiB"),
    ],
)
def test_what_is_no_fragment_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_fragment(text, what="my.config")
    assert caught.value.message.startswith("reading my.config: ")
    assert words in caught.value.message


def test_n_and_not_set_are_one() -> None:
    options = parse_fragment("CONFIG_X=n\n", what="it")
    assert options == parse_fragment("# CONFIG_X is not set\n", what="it")
    assert find_lost(options, "# CONFIG_X is not set\n") == ()


def test_the_two_ways_to_be_lost_are_told_apart() -> None:
    options: dict[str, str | None] = {"NO_SUCH": "y", "NEEDS_MORE": "y", "FORCED": None}
    said = explain_lost(options, options, frozenset({"NEEDS_MORE", "FORCED"}))
    assert said.startswith("the sources have no option CONFIG_NO_SUCH; CONFIG_NEEDS_MORE=y, ")
    assert "# CONFIG_FORCED is not set did not survive" in said
