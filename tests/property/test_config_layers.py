"""Layers of configuration: how two documents become one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from banger.config.settings import merge_layers

_VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
# Few keys, so that documents meet; tables may meet values.
_DOCUMENTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), _VALUES),
    lambda inner: st.dictionaries(st.sampled_from("abc"), _VALUES | inner),
    max_leaves=12,
)


def leaves(document: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value that is no table, by its path."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            found |= leaves(value, (*path, key))
        else:
            found[(*path, key)] = value
    return found


@given(_DOCUMENTS, _DOCUMENTS, _DOCUMENTS)
def test_it_does_not_matter_which_layers_are_merged_first(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    # A value between two tables hides the lower one: then the upper table is put over a table in
    # one order and over the value in the other. No configuration has a key of two kinds.
    if kinds_agree(a, b, c):
        assert merge_layers(merge_layers(a, b), c) == merge_layers(a, merge_layers(b, c))


def kinds_agree(*documents: dict[str, Any]) -> bool:
    tables: set[tuple[str, ...]] = set()
    values: set[tuple[str, ...]] = set()

    def look(document: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in document.items():
            (tables if isinstance(value, dict) else values).add((*path, key))
            if isinstance(value, dict):
                look(value, (*path, key))

    for document in documents:
        look(document, ())
    return not tables & values


@given(_DOCUMENTS, _DOCUMENTS)
def test_upper_layer_is_all_there(lower: dict[str, Any], upper: dict[str, Any]) -> None:
    merged = leaves(merge_layers(lower, upper))
    assert {path: merged.get(path) for path in leaves(upper)} == leaves(upper)


@given(_DOCUMENTS, _DOCUMENTS)
def test_what_the_upper_layer_does_not_mention_stays(
    lower: dict[str, Any], upper: dict[str, Any]
) -> None:
    merged = leaves(merge_layers(lower, upper))
    mentioned = leaves(upper)
    for path, value in leaves(lower).items():
        covered = any(path[: n + 1] in mentioned for n in range(len(path)))
        shadowed = any(p[: len(path)] == path for p in mentioned)
        if not covered and not shadowed and not _is_table(upper, path):
            assert merged[path] == value


def _is_table(document: dict[str, Any], path: tuple[str, ...]) -> bool:
    value: Any = document
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return isinstance(value, dict)


@given(_DOCUMENTS)
def test_empty_layer_says_nothing(document: dict[str, Any]) -> None:
    assert merge_layers(document, {}) == document == merge_layers({}, document)


@given(_DOCUMENTS, _DOCUMENTS)
def test_merging_changes_neither_layer(lower: dict[str, Any], upper: dict[str, Any]) -> None:
    import copy

    before = copy.deepcopy((lower, upper))
    merge_layers(lower, upper)
    assert (lower, upper) == before
