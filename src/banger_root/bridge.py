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
from banger_root.validate import is_bridge_name, mac_of

if TYPE_CHECKING:
    from banger_root.validate import Bridge


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


def remove_bridge_if_unused(rt: Rtnetlink, bridge: Bridge, *, without: str = "") -> None:
    """Delete the bridge unless the port of somebody else is on it.

    Raises:
        HelperError: the tap named `without` is still a port of it.
        NetlinkError: the kernel refused.
    """
    link = rt.find_link(bridge.name)
    if link is None or not _is_ours(link, bridge):
        return
    ports = [port.name for port in rt.links() if port.master == link.index]
    if without in ports:
        raise HelperError("operation_failed", f"{without} is still a port of {link.name}")
    if not ports:
        _delete(rt, link)


def attach_tap(rt: Rtnetlink, tap: str, bridge: Bridge, *, isolate: bool, alias: str) -> None:
    """Put a tap on a bridge, isolated where asked for, write its alias on it, bring it up.

    A tap of a pool has all of this but the isolation, and loses what is known of its last guest.

    Raises:
        HelperError, NetlinkError: the kernel refused.
    """
    link, master = _get(rt, tap), _get(rt, bridge.name)
    fresh = not (link.up and link.master == master.index and link.alias == alias)
    if fresh:
        rt.refuse_ipv6(link.index)
        _disable_ipv6(tap)
        rt.set_alias(link.index, alias)
        rt.set_master(link.index, master.index)
    # Before it is up: no frame passes a port that is not isolated yet.
    rt.reset_port(link.index, isolated=isolate)
    if fresh:
        rt.set_up(link.index)


def is_idle_tap(link: Link | None, bridge: Link | None, *, owner_uid: int, alias: str) -> bool:
    """Whether a tap of a pool is as it was made, and no process has it open."""
    return (
        link is not None
        and bridge is not None
        and link.kind == "tun"
        and link.owner == owner_uid
        and link.master == bridge.index
        and link.alias == alias
        and link.up
        and not link.carrier
    )


def remove_tap(rt: Rtnetlink, tap: str, *, alias: str) -> None:
    """Delete a tap; absent is fine, and so is a link of that name that is none of ours.

    `alias`: what was written on ours; one that was left half made has nothing on it yet.

    Raises:
        NetlinkError: the kernel refused.
    """
    link = rt.find_link(tap)
    if link is not None and link.kind == "tun" and link.alias in ("", alias):
        _delete(rt, link)


def remove_empty_bridge(rt: Rtnetlink, index: int) -> None:
    """Delete a bridge by index if it is one of banger's and has no port.

    Raises:
        NetlinkError: the kernel refused.
    """
    links = rt.links()
    link = next((link for link in links if link.index == index), None)
    if link is None or link.kind != "bridge" or not is_bridge_name(link.name):
        return
    macs = {mac_of(a.address) for a in rt.addresses() if a.index == index}
    if link.mac in macs and not any(port.master == index for port in links):
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
