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


def build(plan: validate.LeasePlan) -> tuple[nft.Element, ...]:
    return nft.build_elements(plan, plan.own_tap)


@unhurried
@given(plans(), st.sampled_from(["create", "delete"]))
def test_every_line_is_one_element_of_our_tables(params: dict[str, Any], verb: str) -> None:
    for element in build(parse(params)):
        assert _LINE.fullmatch(element.format(verb))


@unhurried
@given(plans())
def test_interface_names_are_quoted_and_nothing_else(params: dict[str, Any]) -> None:
    plan = parse(params)
    text = "".join(e.format("create") for e in build(plan))
    assert set(re.findall(r'"([^"]*)"', text)) <= {plan.own_tap, plan.bridge.name}
    assert plan.own_tap not in re.sub(r'"[^"]*"', "", text)


@unhurried
@given(plans(), plans())
def test_a_lease_takes_back_its_own_elements_only(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, other = parse(first), parse(second)
    assume(one.own_tap != other.own_tap)
    theirs = frozenset(build(other))
    ours = frozenset(build(one))
    if one.address == other.address:
        # Only one of the two can be in the kernel: nothing of the other may be taken.
        assert nft.select_ours(one, one.own_tap, theirs) == frozenset()
    else:
        assert nft.select_ours(one, one.own_tap, theirs | ours) == ours


@unhurried
@given(plans(), st.data())
def test_a_lease_takes_back_what_is_left_of_it(params: dict[str, Any], data: st.DataObject) -> None:
    plan = parse(params)
    left = frozenset(data.draw(st.sets(st.sampled_from(build(plan)))))
    assert nft.select_ours(plan, plan.own_tap, left) == left


@unhurried
@given(st.lists(plans(), max_size=4, unique_by=lambda p: p["guest"]["address"]), st.data())
def test_elements_are_stale_exactly_when_their_tap_is_gone(
    params: list[dict[str, Any]], data: st.DataObject
) -> None:
    leases = [parse(p) for p in params]
    assume(len({plan.own_tap for plan in leases}) == len(leases))
    gone = data.draw(st.sets(st.sampled_from(leases))) if leases else set()
    present = frozenset(element for plan in leases for element in build(plan))
    there = frozenset(plan.own_tap for plan in leases if plan not in gone)
    stale = frozenset(element for plan in gone for element in build(plan))
    assert nft.find_stale(present, there) == stale


@unhurried
@given(plans())
def test_nat_is_what_a_plan_says_and_nothing_else_of_it(params: dict[str, Any]) -> None:
    on, off = parse({**params, "nat": True}), parse({**params, "nat": False})
    more = set(build(on)) - set(build(off))
    assert set(build(off)) < set(build(on))
    assert {(e.family, e.set_name, e.parts) for e in more} == {
        ("bridge", "nat_taps", (on.own_tap,)),
        ("inet", "nat_addresses", (str(on.address),)),
    }
