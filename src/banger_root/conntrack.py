"""Forgetting the connections of a guest, so that none outlives its NAT.

The rules alone stop every packet of a guest that has no NAT any more. What stays is the kernel's
memory of its connections, for days, and with it the way in for their peers: the next guest with
this address would be sent what was meant for the last one. Sources: linux/netfilter/nfnetlink.h,
linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

from banger_root.netlink import Netlink, NetlinkError, attribute, attributes, nested

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address

_NETLINK_NETFILTER = 12
# The subsystem is the upper byte of the message's type.
_CT_GET, _CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
_NFGENMSG = struct.Struct("=BBH")
_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE, _CTA_FILTER = 1, 12, 18, 25
_CTA_TUPLE_IP, _CTA_IP_V4_SRC = 1, 1
_CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 1, 2
_FILTER_IP_SRC = 1

# No conntrack in this kernel, or none that can be asked: then the rules have to do, and they do.
_NOT_THERE = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)


def forget_connections(address: IPv4Address) -> int:
    """Drop what the kernel knows of the connections that this address opened; how many.

    Raises:
        NetlinkError: the kernel refused.
    """
    count = 0
    header = _NFGENMSG.pack(socket.AF_INET, 0, 0)
    try:
        with Netlink(_NETLINK_NETFILTER) as line:
            for attributes_ in list(_find(line, header, address)):
                try:
                    line.do(_CT_DELETE, header + attributes_)
                    count += 1
                except NetlinkError as e:
                    if e.errno != errno.ENOENT:  # it ended meanwhile
                        raise
    except OSError as e:
        if e.errno not in _NOT_THERE:
            raise
    return count


def _find(line: Netlink, header: bytes, address: IPv4Address) -> Iterator[bytes]:
    """What names each of the connections in a request to delete it."""
    source = nested(_CTA_TUPLE_IP, attribute(_CTA_IP_V4_SRC, address.packed))
    # Busy hosts have hundreds of thousands of entries: the kernel sorts them out, since 5.8. An
    # older one gives them all.
    wanted = nested(_CTA_TUPLE_ORIG, source) + nested(
        _CTA_FILTER,
        attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _FILTER_IP_SRC))
        + attribute(_CTA_FILTER_REPLY_FLAGS, struct.pack("=I", 0)),
    )
    for body in line.dump(_CT_GET, header + wanted):
        fields = dict(attributes(body[_NFGENMSG.size :]))
        original = fields.get(_CTA_TUPLE_ORIG, b"")
        addresses = dict(attributes(dict(attributes(original)).get(_CTA_TUPLE_IP, b"")))
        if addresses.get(_CTA_IP_V4_SRC) != address.packed:
            continue
        name = nested(_CTA_TUPLE_ORIG, original)
        # The id, because the tuple can belong to a new connection by now.
        for kind in (_CTA_ID, _CTA_ZONE):
            if kind in fields:
                name += attribute(kind, fields[kind])
        yield name
