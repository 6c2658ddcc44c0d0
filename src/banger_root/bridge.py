"""The bridge of a subnet and the taps on it.

A bridge is shared by leases, of this ledger and of others. It is known as ours by its name and its
MAC, which is derived from its address and given when it is made; it exists from the first lease on
it to the last. IPv6 is off on everything made here, before it is up: guests are IPv4 only.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from banger_root.errors import HelperError
from banger_root.netlink import Link, NetlinkError, Rtnetlink
from banger_root.overlap import check_overlap

if TYPE_CHECKING:
    from banger_root.validate import Bridge, LeasePlan


def check_bridge(rt: Rtnetlink, bridge: Bridge) -> None:
    """Refuse a bridge whose name a foreign link has, or whose subnet is in use elsewhere.

    Raises:
        HelperError: reason in_use or subnet_overlap.
    """
    link = rt.find_link(bridge.name)
    if link is not None and not _is_ours(link, bridge):
        raise HelperError(
            "already_exists",
            f"making the bridge {bridge.name} with {bridge.address}/{bridge.prefix}: "
            f"a link of that name exists ({link.kind or 'hardware'}, MAC {link.mac or 'none'}) "
            f"and is not this bridge",
            hint=f"ip -d address show {bridge.name}",
            reason="in_use",
        )
    # A bridge with its address is in use already; a VPN that came up since must not stop a start.
    if link is None or not _has_address(rt, link, bridge):
        names = {other.index: other.name for other in rt.links()}
        check_overlap(bridge, rt.addresses(), rt.routes(), names)


def ensure_bridge(rt: Rtnetlink, bridge: Bridge) -> None:
    """Make the bridge, or finish what an earlier call left half done.

    Raises:
        HelperError, NetlinkError: the kernel refused.
    """
    link = rt.find_link(bridge.name)
    if link is None:
        rt.add_bridge(bridge.name, bridge.mac)
        link = _get(rt, bridge.name)
    if not _has_address(rt, link, bridge):
        rt.refuse_ipv6(link.index)
        _disable_ipv6(bridge.name)
        rt.add_address(link.index, bridge.address, bridge.prefix)
    if not link.up:
        rt.set_up(link.index)


def remove_bridge_if_unused(rt: Rtnetlink, plan: LeasePlan) -> None:
    """Delete the lease's bridge unless the port of somebody else is on it.

    Raises:
        HelperError: the lease's own tap is still a port of it.
        NetlinkError: the kernel refused.
    """
    link = rt.find_link(plan.bridge.name)
    if link is None or not _is_ours(link, plan.bridge):
        return
    ports = [port.name for port in rt.links() if port.master == link.index]
    if plan.own_tap in ports:
        raise HelperError("operation_failed", f"{plan.own_tap} is still a port of {link.name}")
    if not ports:
        _delete(rt, link)


def attach_tap(rt: Rtnetlink, plan: LeasePlan) -> None:
    """Put the lease's tap on its bridge, isolated where asked for, and bring it up.

    Raises:
        HelperError, NetlinkError: the kernel refused.
    """
    tap, bridge = _get(rt, plan.own_tap), _get(rt, plan.bridge.name)
    rt.refuse_ipv6(tap.index)
    _disable_ipv6(plan.own_tap)
    rt.set_master(tap.index, bridge.index)
    # Before it is up: no frame passes a port that is not isolated yet.
    rt.isolate_port(tap.index, isolated=plan.isolate)
    rt.set_up(tap.index)


def remove_tap(rt: Rtnetlink, plan: LeasePlan) -> None:
    """Delete the lease's tap; absent is fine, and so is a link of that name which is no tap.

    Raises:
        NetlinkError: the kernel refused.
    """
    link = rt.find_link(plan.own_tap)
    if link is not None and link.kind == "tun":
        _delete(rt, link)


def find_bridges(rt: Rtnetlink, bridges: set[Bridge]) -> list[dict[str, object]]:
    """Those of the bridges that exist, each with the names of its ports."""
    links = rt.links()
    found: list[dict[str, object]] = []
    for bridge in sorted(bridges, key=lambda b: b.name):
        link = next((link for link in links if link.name == bridge.name), None)
        if link is not None and _is_ours(link, bridge):
            found.append(
                {
                    "name": bridge.name,
                    "address": str(bridge.address),
                    "prefix": bridge.prefix,
                    "ports": sorted(port.name for port in links if port.master == link.index),
                }
            )
    return found


def _is_ours(link: Link, bridge: Bridge) -> bool:
    return link.kind == "bridge" and link.mac == bridge.mac


def _has_address(rt: Rtnetlink, link: Link, bridge: Bridge) -> bool:
    return any(
        (a.index, a.address, a.prefix) == (link.index, bridge.address, bridge.prefix)
        for a in rt.addresses()
    )


def _get(rt: Rtnetlink, name: str) -> Link:
    link = rt.find_link(name)
    if link is None:
        raise HelperError("operation_failed", f"the link {name} has disappeared")
    return link


def _delete(rt: Rtnetlink, link: Link) -> None:
    try:
        rt.delete_link(link.index)
    except NetlinkError as e:
        if e.errno != errno.ENODEV:
            raise


def _disable_ipv6(name: str) -> None:
    """Netlink has no word for this one (Documentation/networking/ip-sysctl.rst)."""
    path = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as e:
        # A kernel without IPv6, or a container with /proc/sys read-only: no link-local address
        # appears all the same, because the address generation mode is none.
        if e.errno in (errno.ENOENT, errno.EROFS, errno.EACCES):
            return
        raise
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
