"""Which addresses and routes stand in the way of a bridge, without a host."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from banger_root.errors import HelperError
from banger_root.netlink import Address, Route
from banger_root.overlap import check_overlap, find_free_subnet
from banger_root.validate import Bridge

BRIDGE = Bridge(name="br-fc", address=IPv4Address("172.16.0.1"), prefix=24)
NAMES = {1: "lo", 2: "eth0", 3: "br-fc", 4: "tun0"}


def route(destination: str, index: int = 4, gateway: str | None = None) -> Route:
    return Route(
        destination=IPv4Network(destination),
        gateway=IPv4Address(gateway) if gateway else None,
        index=index,
        table=254,
    )


def address(text: str, prefix: int, index: int) -> Address:
    return Address(index=index, address=IPv4Address(text), prefix=prefix)


def test_neighbouring_subnet_is_fine() -> None:
    check_overlap(BRIDGE, [address("172.16.1.1", 24, 2)], [route("172.16.1.0/24")], NAMES)


def test_entries_of_the_bridge_itself_do_not_count() -> None:
    check_overlap(BRIDGE, [address("172.16.0.1", 24, 3)], [route("172.16.0.0/24", 3)], NAMES)


@pytest.mark.parametrize("destination", ["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"])
def test_default_route_does_not_count(destination: str) -> None:
    check_overlap(BRIDGE, [], [route(destination)], NAMES)


def test_wider_route_is_named_with_gateway_and_link() -> None:
    with pytest.raises(HelperError, match=r"172\.16\.0\.0/12 via 10\.8\.0\.1 dev tun0") as caught:
        check_overlap(BRIDGE, [], [route("172.16.0.0/12", gateway="10.8.0.1")], NAMES)
    assert caught.value.hint == 'set bridge_ip = "10.77.77.1" and cidr = 24 in the configuration'


def test_route_without_a_link_is_named() -> None:
    with pytest.raises(HelperError, match=r"the route 172\.16\.0\.128/32$"):
        check_overlap(BRIDGE, [], [route("172.16.0.128/32", index=0)], NAMES)


def test_address_inside_a_larger_subnet_is_named() -> None:
    with pytest.raises(HelperError, match=r"the address 172\.16\.9\.9/16 of eth0"):
        check_overlap(BRIDGE, [address("172.16.9.9", 16, 2)], [], NAMES)


def test_no_free_subnet_is_no_false_hint() -> None:
    everything = [IPv4Network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    found = find_free_subnet(everything)
    assert found is not None
    assert found.subnet_of(IPv4Network("100.64.0.0/10"))
    assert find_free_subnet([*everything, IPv4Network("100.64.0.0/10")]) is None
