"""Whether a subnet of ours would take addresses that this host already reaches elsewhere.

Pure: it compares what `netlink` read. A subnet that overlaps would silently swallow the traffic to
somebody's LAN or VPN, so it is refused and a free one is named.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from banger_root.netlink import Address, Route
    from banger_root.validate import Bridge

# 0.0.0.0/1 and 128.0.0.0/1 are how VPN clients write a default route without replacing it.
_DEFAULT_PREFIX = 1


def check_overlap(
    bridge: Bridge,
    addresses: Iterable[Address],
    routes: Iterable[Route],
    names: Mapping[int, str],
) -> None:
    """Refuse a bridge whose subnet overlaps an address or route of another interface.

    `names` maps link indices to names. Default routes and the bridge's own entries do not count.

    Raises:
        HelperError: reason subnet_overlap, naming interface and route, with a free /24 as hint.
    """
    taken = list(_taken(bridge.name, addresses, routes, names))
    for network, what in taken:
        if network.overlaps(bridge.subnet):
            free = find_free_subnet(network for network, _ in taken)
            raise HelperError(
                "operation_failed",
                f"making the bridge {bridge.name}: its subnet {bridge.subnet} overlaps {what}",
                hint=f'set bridge_ip = "{free[1]}" and cidr = 24 in the configuration'
                if free
                else "ip route show table all",
                reason="subnet_overlap",
            )


def find_free_subnet(taken: Iterable[IPv4Network]) -> IPv4Network | None:
    """A private /24 that overlaps none of `taken`, or None."""
    known = list(taken)
    for candidate in _candidates():
        if not any(candidate.overlaps(network) for network in known):
            return candidate
    return None


def _taken(
    own: str, addresses: Iterable[Address], routes: Iterable[Route], names: Mapping[int, str]
) -> Iterator[tuple[IPv4Network, str]]:
    for address in addresses:
        name = names.get(address.index, f"link {address.index}")
        if name != own:
            what = f"the address {address.address}/{address.prefix} of {name}"
            yield address.subnet, what
    for route in routes:
        name = names.get(route.index, "")
        if name == own or route.destination.prefixlen <= _DEFAULT_PREFIX:
            continue
        via = f" via {route.gateway}" if route.gateway else ""
        dev = f" dev {name}" if name else ""
        yield route.destination, f"the route {route.destination}{via}{dev}"


def _candidates() -> Iterator[IPv4Network]:
    for second in range(16, 32):
        for third in (0, 77, 200):
            yield IPv4Network(f"172.{second}.{third}.0/24")
    for second in range(77, 256):
        yield IPv4Network(f"10.{second}.77.0/24")
    for third in range(77, 255):
        yield IPv4Network(f"192.168.{third}.0/24")
    for second in range(64, 128):
        yield IPv4Network(f"100.{second}.77.0/24")
