"""The nft text of any lease: one known element a line, and what was read back is told apart."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from banger_root import nft, validate
from property.test_root_gate import plans, unhurried

_LINE = re.compile(
    r"(create|delete) element (inet|bridge) banger [a-z_]+ "
    r'\{ [0-9a-z.:"-]+( \. [0-9a-z.:"-]+)* \}\n'
)


def parse(params: dict[str, Any]) -> validate.LeasePlan:
    return validate.parse_prepare(params)


@unhurried
@given(plans(), st.sampled_from(["create", "delete"]))
def test_every_line_is_one_element_of_our_tables(params: dict[str, Any], verb: str) -> None:
    for element in nft.build_elements(parse(params)):
        assert _LINE.fullmatch(element.format(verb))


@unhurried
@given(plans())
def test_interface_names_are_quoted_and_nothing_else(params: dict[str, Any]) -> None:
    plan = parse(params)
    text = "".join(e.format("create") for e in nft.build_elements(plan))
    assert set(re.findall(r'"([^"]*)"', text)) <= {plan.own_tap, plan.bridge.name}
    assert plan.own_tap not in re.sub(r'"[^"]*"', "", text)


@unhurried
@given(plans(), plans())
def test_a_lease_takes_back_its_own_elements_only(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, other = parse(first), parse(second)
    assume(one.own_tap != other.own_tap)
    theirs = frozenset(nft.build_elements(other))
    ours = frozenset(nft.build_elements(one))
    if one.address == other.address:
        # Only one of the two can be in the kernel: nothing of the other may be taken.
        assert nft.select_ours(one, theirs) == frozenset()
    else:
        assert nft.select_ours(one, theirs | ours) == ours


@unhurried
@given(plans(), st.data())
def test_a_lease_takes_back_what_is_left_of_it(params: dict[str, Any], data: st.DataObject) -> None:
    plan = parse(params)
    left = frozenset(data.draw(st.sets(st.sampled_from(nft.build_elements(plan)))))
    assert nft.select_ours(plan, left) == left
