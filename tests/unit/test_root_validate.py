"""The rules of the helper's gate, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from banger_root import fields, validate
from banger_root.errors import HelperError


def build_params() -> dict[str, Any]:
    return {
        "vm_id": "0123456789abcdef0123456789abcdef",
        "bridge": {"name": "br-fc", "address": "172.16.0.1", "prefix": 24},
        "guest": {"address": "172.16.0.2", "mac": "06:00:ac:10:00:02"},
        "isolate": True,
        "announce_port": 7001,
        "nat": False,
        "guest_host_ports": [],
        "limits": {"vcpu": 1, "memory_mib": 128},
        "jail": False,
    }


def test_plan_has_the_tap_and_mac_that_follow_from_it() -> None:
    plan = validate.parse_prepare(build_params())
    assert plan.own_tap == "tap-fc-01234567"
    assert plan.mac == "06:00:ac:10:00:02"
    assert plan.bridge.mac == "06:00:ac:10:00:01"


REFUSED: list[tuple[str, Any]] = [
    ("vm_id", "0123456789ABCDEF0123456789ABCDEF"),
    ("vm_id", "0123456789abcdef0123456789abcde"),
    ("vm_id", "0123456789abcdef0123456789abcdef\n"),
    ("vm_id", "../../../../etc/passwd0000000000"),
    ("bridge.name", "eth0"),
    ("bridge.name", "br-fcx"),
    ("bridge.name", "br-fc-"),
    ("bridge.name", "br-fc-0123456789"),
    ("bridge.name", "br-fc-A"),
    ("bridge.name", "br-fc-a/b"),
    ("bridge.name", 'br-fc-a"b'),
    ("bridge.name", "br-fc\n"),
    ("bridge.address", "8.8.8.1"),
    ("bridge.address", "127.0.0.1"),
    ("bridge.address", "169.254.0.1"),
    ("bridge.address", "172.16.0.0"),
    ("bridge.address", "172.16.0.255"),
    ("bridge.address", "172.016.0.1"),
    ("bridge.address", "::1"),
    ("bridge.address", 2886729729),
    ("bridge.prefix", 7),
    ("bridge.prefix", 8),  # 172.0.0.0/8 is not all private
    ("bridge.prefix", 31),
    ("bridge.prefix", True),
    ("bridge.prefix", 24.0),
    ("guest.address", "172.16.1.2"),
    ("guest.address", "172.16.0.1"),
    ("guest.address", "172.16.0.0"),
    ("guest.address", "172.16.0.255"),
    ("guest.mac", "06:00:ac:10:00:03"),
    ("guest.mac", "06:00:AC:10:00:02"),
    ("isolate", 1),
    ("isolate", None),
    ("announce_port", 0),
    ("announce_port", 65536),
    ("announce_port", "7001"),
    ("announce_port", True),
    ("nat", 1),
    ("nat", None),
    ("jail", "yes"),
    ("guest_host_ports", 80),
    ("guest_host_ports", {"80": 80}),
    ("guest_host_ports", [0]),
    ("guest_host_ports", [65536]),
    ("guest_host_ports", ["80"]),
    ("guest_host_ports", [True]),
    ("guest_host_ports", list(range(1, 34))),
    ("limits", None),
    ("limits.vcpu", 0),
    ("limits.vcpu", 33),
    ("limits.vcpu", 1.0),
    ("limits.memory_mib", 127),
    ("limits.memory_mib", 2**40),
    ("limits.memory_mib", True),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}={v!r}" for f, v in REFUSED])
def test_value_against_a_rule_is_refused(field: str, value: Any) -> None:
    params = build_params()
    where, _, name = field.rpartition(".")
    (params[where] if where else params)[name] = value
    with pytest.raises(HelperError) as caught:
        validate.parse_prepare(params)
    assert caught.value.code == "bad_request"


def test_refusal_names_field_rule_and_value() -> None:
    params = build_params()
    params["bridge"]["name"] = "eth0"
    with pytest.raises(HelperError, match='^bridge.name must be br-fc, or .* not "eth0"$'):
        validate.parse_prepare(params)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "bad_request"),
        (b"[]", "bad_request"),
        (b'{"version":1,"version":1,"method":"sweep"}', "bad_request"),
        (b'{"version":1,"method":"sweep","params":{"x":NaN}}', "bad_request"),
        (b'{"version":1,"method":"sweep","params":[]}', "bad_request"),
        (b'{"version":1,"method":"sweep","op_id":"a b"}', "bad_request"),
        (b"\xff", "bad_request"),
        (b" " * (fields.LINE_LIMIT + 1), "bad_request"),
        (b"[" * 100_000, "bad_request"),
        (b'{"version":1,"method":"sweep","params":{"x":' + b"9" * 5000 + b"}}", "bad_request"),
        (b'{"version":2,"method":"sweep"}', "bad_version"),
        (b'{"version":true,"method":"sweep"}', "bad_version"),
        (b'{"method":"sweep"}', "bad_version"),
        (b'{"version":1,"method":"reboot"}', "unknown_method"),
        (b'{"version":1,"method":["sweep"]}', "unknown_method"),
        (b'{"version":1}', "unknown_method"),
    ],
    ids=lambda value: repr(value[:50]),
)
def test_line_that_is_no_request_is_refused(line: bytes, code: str) -> None:
    with pytest.raises(HelperError) as caught:
        validate.parse_request(line)
    assert caught.value.code == code


def test_unknown_field_of_the_envelope_is_ignored() -> None:
    request = validate.parse_request(b'{"version":1,"method":"sweep","token":"x"}')
    assert (request.method, request.params, request.op_id) == ("sweep", {}, "")


POOL = {"bridge": {"name": "br-fc", "address": "172.16.0.1", "prefix": 24}, "size": 4}


def test_sweep_without_a_pool_leaves_pools_alone() -> None:
    assert validate.parse_sweep({"pool": None}) is validate.parse_sweep({}) is None


def test_sweep_with_a_pool_names_bridge_and_size() -> None:
    plan = validate.parse_sweep({"pool": POOL})
    assert plan is not None
    assert (plan.bridge.name, plan.size) == ("br-fc", 4)


@pytest.mark.parametrize(
    "params",
    [
        {"pool": 4},
        {"pool": {}},
        {"pool": {**POOL, "size": -1}},
        {"pool": {**POOL, "size": 65}},
        {"pool": {**POOL, "size": True}},
        {"pool": {**POOL, "tap": "tap-pool-1"}},
        {"pool": {**POOL, "bridge": {**build_params()["bridge"], "name": "eth0"}}},
        {"pool": None, "more": 1},
    ],
)
def test_sweep_against_a_rule_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(HelperError) as caught:
        validate.parse_sweep(params)
    assert caught.value.code == "bad_request"
