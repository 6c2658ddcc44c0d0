"""Names in `.vm` for the whole host: systemd-resolved asks our DNS server for them, and no other.

The setting belongs to a bridge's link and goes with it; names outside its domains are never routed
here. Spoken through `resolvectl`, which is systemd's own way in. Sources: resolvectl(1),
systemd-resolved.service(8), RFC 1035 section 3.5.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from banger_root import process
from banger_root.errors import HelperError
from banger_root.netlink import Rtnetlink
from banger_root.validate import mac_of

if TYPE_CHECKING:
    from ipaddress import IPv4Network

    from banger_root.netlink import Link
    from banger_root.validate import ResolverPlan

ZONE = "~vm"
_RUNTIME = "/run/systemd/resolve"


def set_resolver(plan: ResolverPlan) -> dict[str, Any]:
    """Route the zones of a bridge to a server, or take that back; a bridge that is gone has none.

    Raises:
        HelperError: reason unsupported: systemd-resolved does not run; bad_request: the zones are
            not those of the bridge's subnet; not_found: no such bridge of ours.
    """
    doing = f"{'routing' if plan.server else 'clearing'} names through {plan.link}"
    with Rtnetlink() as rt:
        link = next((link for link in rt.links() if link.name == plan.link), None)
        subnets = [
            a.subnet
            for a in rt.addresses()
            if link is not None and a.index == link.index and link.mac == mac_of(a.address)
        ]
    if not plan.server:
        if link is not None:
            _require_resolved(doing)
            _check_link(link, subnets, doing)
            _resolvectl("revert", plan.link)
        return {}
    if link is None:
        raise HelperError(
            "not_found",
            f"{doing}: there is no link {plan.link}: it exists while a VM or a tap pool needs it",
            hint="banger vm list",
        )
    _check_link(link, subnets, doing)
    wanted = {ZONE, *(f"~{zone}" for subnet in subnets for zone in reverse_zones(subnet))}
    if set(plan.domains) != wanted:
        raise HelperError(
            "bad_request",
            f"domains must be {ZONE} and the reverse zones of {subnets[0]}: "
            f"{', '.join(sorted(wanted))}",
        )
    _require_resolved(doing)
    # The domains before the server: at no moment does the link answer for other names.
    _resolvectl("default-route", plan.link, "false")
    _resolvectl("domain", plan.link, *plan.domains)
    _resolvectl("dns", plan.link, plan.server)
    return {}


def reverse_zones(subnet: IPv4Network) -> tuple[str, ...]:
    """The zones in which a subnet's addresses have their names, and no other address has.

    A zone ends at a byte of the address, so a subnet that does not is several zones, 128 at most.
    """
    count = -(-subnet.prefixlen // 8)
    return tuple(
        ".".join(reversed(str(part.network_address).split(".")[:count])) + ".in-addr.arpa"
        for part in subnet.subnets(new_prefix=count * 8)
    )


def _check_link(link: Link, subnets: list[IPv4Network], doing: str) -> None:
    if link.kind != "bridge" or not subnets:
        raise HelperError(
            "not_found",
            f"{doing}: the link of that name is no bridge of banger's",
            hint=f"ip -d address show {link.name}",
        )


def _require_resolved(doing: str) -> None:
    if not os.path.isdir(_RUNTIME) or process.find_program("resolvectl") is None:
        raise HelperError(
            "operation_failed",
            f"{doing}: systemd-resolved does not run on this host",
            hint="systemctl status systemd-resolved",
            reason="unsupported",
        )


def _resolvectl(*words: str) -> None:
    process.run("resolvectl", ["--no-pager", *words])
