"""Routing of `.vm` through systemd-resolved, judged by what resolvectl would be told."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger_root import process, resolver, validate
from banger_root.errors import HelperError
from property.fake_kernel import FakeKernel

ZONES = ["~vm", "~0.16.172.in-addr.arpa"]
SET = {"action": "set", "link": "br-fc", "server": "127.0.0.1:42069", "domains": ZONES}
CLEAR = {"action": "clear", "link": "br-fc", "server": "", "domains": []}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A host with the bridge and systemd-resolved; the words that resolvectl got."""
    kernel = FakeKernel()
    kernel.add_bridge("br-fc", "06:00:ac:10:00:01")
    kernel.add_address(1, IPv4Address("172.16.0.1"), 24)
    kernel.add_bridge("br-fc-x", "02:00:00:00:00:09")
    kernel.add_address(2, IPv4Address("172.16.1.1"), 24)
    monkeypatch.setattr(resolver, "Rtnetlink", kernel)
    monkeypatch.setattr(resolver, "_RUNTIME", str(tmp_path))
    monkeypatch.setattr(process, "DIRECTORIES", (str(tmp_path),))
    program = tmp_path / "resolvectl"
    log = tmp_path / "log"
    log.touch()
    program.write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    program.chmod(0o755)
    return lambda: log.read_text().splitlines()


def call(params: dict[str, Any]) -> dict[str, Any]:
    return resolver.set_resolver(validate.parse_resolver(params))


def test_set_routes_the_zones_and_nothing_else(told: Callable[[], list[str]]) -> None:
    assert call(SET) == {}
    assert told() == [
        "--no-pager default-route br-fc false",
        "--no-pager domain br-fc ~vm ~0.16.172.in-addr.arpa",
        "--no-pager dns br-fc 127.0.0.1:42069",
    ]


def test_clear_reverts_the_link(told: Callable[[], list[str]]) -> None:
    assert call(CLEAR) == {}
    assert told() == ["--no-pager revert br-fc"]


def test_clear_of_a_bridge_that_is_gone_is_fine(told: Callable[[], list[str]]) -> None:
    assert call({**CLEAR, "link": "br-fc-gone"}) == {}
    assert told() == []


@pytest.mark.parametrize("action", [SET, CLEAR], ids=["set", "clear"])
def test_foreign_bridge_is_refused(told: Callable[[], list[str]], action: dict[str, Any]) -> None:
    with pytest.raises(HelperError, match="no bridge of banger's"):
        call({**action, "link": "br-fc-x"})
    assert told() == []


@pytest.mark.parametrize(
    "domains",
    [
        ["~vm", "~16.172.in-addr.arpa"],
        ["~vm", "~1.16.172.in-addr.arpa"],
        [*ZONES, "~1.16.172.in-addr.arpa"],
    ],
)
def test_zones_of_others_are_refused(told: Callable[[], list[str]], domains: list[str]) -> None:
    with pytest.raises(HelperError, match="reverse zones of 172.16.0.0/24") as caught:
        call({**SET, "domains": domains})
    assert caught.value.code == "bad_request"
    assert told() == []


@pytest.mark.parametrize("action", [SET, CLEAR], ids=["set", "clear"])
def test_host_without_systemd_resolved_says_so(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, action: dict[str, Any]
) -> None:
    monkeypatch.setattr(resolver, "_RUNTIME", "/nonexistent")
    with pytest.raises(HelperError, match="systemd-resolved does not run") as caught:
        call(action)
    assert caught.value.reason == "unsupported"


REFUSED: list[tuple[str, Any]] = [
    ("action", "revert"),
    ("link", "eth0"),
    ("link", "lo"),
    ("server", "8.8.8.8"),
    ("server", "172.16.0.1:53"),
    ("server", "127.0.0.1:0"),
    ("server", "127.0.0.1:65536"),
    ("server", "127.0.0.1:053"),
    ("server", "127.0.0.1: 53"),
    ("server", "127.0.0.1:53#name"),
    ("server", "::1"),
    ("server", ""),
    ("server", None),
    ("domains", []),
    ("domains", ["~vm"]),
    ("domains", ["~.", *ZONES]),
    ("domains", ["vm", ZONES[1]]),
    ("domains", ["~vm", "~in-addr.arpa"]),
    ("domains", ["~vm", "~example.com"]),
    ("domains", ["~vm", "~0.16.172.in-addr.arpa\n"]),
    ("domains", [*ZONES, ZONES[1]]),
    ("domains", "~vm"),
    ("domains", ["~vm", *(f"~{n}.16.172.in-addr.arpa" for n in range(200))]),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}={v!r:.40}" for f, v in REFUSED])
def test_value_against_a_rule_is_refused(field: str, value: Any) -> None:
    with pytest.raises(HelperError) as caught:
        validate.parse_resolver({**SET, field: value})
    assert caught.value.code == "bad_request"


def test_clear_takes_neither_server_nor_domains() -> None:
    for field in ("server", "domains"):
        with pytest.raises(HelperError):
            validate.parse_resolver({**CLEAR, field: SET[field]})


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 30), st.data())
def test_reverse_zones_hold_the_names_of_the_subnet_and_no_other(
    base: int, prefix: int, data: st.DataObject
) -> None:
    subnet = IPv4Network((base, prefix), strict=False)
    zones = resolver.reverse_zones(subnet)
    assert len(zones) <= 128
    inside = subnet[data.draw(st.integers(0, subnet.num_addresses - 1))]
    outside = IPv4Address(data.draw(st.integers(0, 2**32 - 1)))
    for address in (inside, outside):
        name = address.reverse_pointer
        held = any(name == zone or name.endswith(f".{zone}") for zone in zones)
        assert held is (address in subnet)
    params = {**SET, "domains": ["~vm", *(f"~{zone}" for zone in zones)]}
    assert validate.parse_resolver(params).domains[0] == "~vm"
