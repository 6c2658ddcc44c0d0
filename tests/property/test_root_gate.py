"""The helper's gate under arbitrary input: a typed refusal or a checked value, nothing else."""

from __future__ import annotations

import copy
import json
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger_root import fields, validate
from banger_root.errors import HelperError

# A loaded machine is no defect of the code under test.
unhurried = settings(deadline=None)

VM_ID = "0123456789abcdef0123456789abcdef"

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["br-fc", "172.16.0.1", VM_ID, "06:00:ac:10:00:02", 24, 7001, 2**70])
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Params that are right."""
    space = draw(st.sampled_from([("10.0.0.0", 8), ("172.16.0.0", 12), ("192.168.0.0", 16)]))
    prefix = draw(st.integers(max(8, space[1]), 30))
    size = 1 << (32 - prefix)
    base = int(IPv4Address(space[0])) + draw(st.integers(0, (1 << (prefix - space[1])) - 1)) * size
    hosts = draw(
        st.lists(st.integers(1, size - 2), min_size=2, max_size=2, unique=True)
        if size > 4
        else st.just([1, 2])
    )
    guest = IPv4Address(base + hosts[1])
    name = draw(st.just("br-fc") | st.from_regex(r"\Abr-fc-[a-z0-9-]{1,9}\Z"))
    return {
        "vm_id": draw(st.text("0123456789abcdef", min_size=32, max_size=32)),
        "bridge": {"name": name, "address": str(IPv4Address(base + hosts[0])), "prefix": prefix},
        "guest": {"address": str(guest), "mac": validate.mac_of(guest)},
        "isolate": draw(st.booleans()),
        "announce_port": draw(st.integers(1, 65535)),
        "nat": draw(st.booleans()),
        "guest_host_ports": draw(st.lists(st.integers(1, 65535), max_size=32)),
        "limits": {
            "vcpu": draw(st.integers(1, 32)),
            "memory_mib": draw(st.integers(128, 1 << 20)),
        },
        "jail": draw(st.booleans()),
    }


def places(params: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of all fields."""
    found: list[tuple[str, ...]] = []
    for key, value in params.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, inner) for inner in value]
    return found


def holder(params: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        params = params[key]
    return params


@unhurried
@given(plans())
def test_right_params_pass_and_survive_the_ledger(params: dict[str, Any]) -> None:
    plan = validate.parse_prepare(params)
    assert validate.format_plan(plan) == params
    assert len(plan.own_tap) <= 15
    assert len(plan.bridge.name) <= 15


@unhurried
@given(plans(), st.data())
def test_unknown_field_is_refused_wherever_it_is(
    params: dict[str, Any], data: st.DataObject
) -> None:
    where = data.draw(
        st.sampled_from([params, params["bridge"], params["guest"], params["limits"]])
    )
    name = data.draw(st.text().filter(lambda n: n not in where))
    where[name] = data.draw(values)
    with pytest.raises(HelperError) as caught:
        validate.parse_prepare(params)
    assert caught.value.code == "bad_request"


@unhurried
@given(plans(), st.data())
def test_missing_field_is_refused(params: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(params)))
    del holder(params, path)[path[-1]]
    with pytest.raises(HelperError, match=path[-1]):
        validate.parse_prepare(params)


@unhurried
@given(plans(), st.data())
def test_value_of_another_type_is_refused(params: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(params)))
    where = holder(params, path)
    kind = type(where[path[-1]])
    # `type() is`: True is no number here and 1.0 no port.
    where[path[-1]] = data.draw(values.filter(lambda v: type(v) is not kind))
    with pytest.raises(HelperError) as caught:
        validate.parse_prepare(params)
    assert caught.value.code == "bad_request"


@unhurried
@given(plans(), st.data())
def test_value_that_passes_obeys_the_rules(params: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(params)))
    holder(params, path)[path[-1]] = data.draw(values)
    try:
        plan = validate.parse_prepare(copy.deepcopy(params))
    except HelperError as e:
        assert e.code == "bad_request"
        return
    assert plan.address in plan.bridge.subnet
    assert plan.address != plan.bridge.address
    assert plan.bridge.address.is_private
    assert params["guest"]["mac"] == plan.mac
    assert validate.is_bridge_name(plan.bridge.name)


@unhurried
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_end_in_a_typed_refusal(line: bytes) -> None:
    with pytest.raises(HelperError):
        validate.parse_request(line)


@unhurried
@given(values)
def test_any_json_ends_in_a_request_or_a_typed_refusal(value: Any) -> None:
    try:
        validate.parse_request(json.dumps(value).encode())
    except HelperError:
        return


@unhurried
@given(st.dictionaries(st.sampled_from(["version", "method", "params", "op_id", "more"]), values))
def test_any_envelope_ends_in_a_request_or_a_typed_refusal(envelope: dict[str, Any]) -> None:
    try:
        request = validate.parse_request(json.dumps(envelope).encode())
    except HelperError:
        return
    assert request.method in validate.METHODS


@unhurried
@given(st.integers(0, 40), st.sampled_from(["[", '{"a":']))
def test_depth_is_bounded_before_anything_is_parsed(depth: int, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    inner = opening * depth + "1" + closing * depth
    line = f'{{"version":1,"method":"sweep","params":{{"x":{inner}}}}}'.encode()
    if depth + 2 <= fields.DEPTH_LIMIT:
        assert validate.parse_request(line).method == "sweep"
    else:
        with pytest.raises(HelperError, match="nests deeper"):
            validate.parse_request(line)


@unhurried
@given(st.text(alphabet='[]{}"\\ab', max_size=30))
def test_brackets_in_strings_do_not_count(text: str) -> None:
    line = json.dumps({"version": 1, "method": "sweep", "params": {"x": text}}).encode()
    assert validate.parse_request(line).params == {"x": text}
