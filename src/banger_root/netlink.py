"""Links, addresses and routes, spoken directly to the kernel over rtnetlink.

One `Netlink` is one socket, of whichever family; it lives as long as its `with` block and sees the
network namespace in which it was opened. Only what the helper needs is here. Sources:
rtnetlink(7), netlink(7), linux/if_link.h, linux/if_bridge.h, linux/if_tun.h, linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_GETADDR, _RTM_GETROUTE = 20, 22, 26
_NLM_F_REQUEST, _NLM_F_ACK = 0x1, 0x4
_NLM_F_DUMP, _NLM_F_EXCL, _NLM_F_CREATE = 0x300, 0x200, 0x400
_NLM_F_CAPPED, _NLM_F_ACK_TLVS, _NLM_F_DUMP_INTR = 0x100, 0x200, 0x10
_NLMSGERR_ATTR_MSG = 1
_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_PROTINFO = 1, 3, 10, 12
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_AF_SPEC = 18, 20, 26
_IFLA_TUN_OWNER = 1
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# struct br_boolopt_multi: values, and which of them are meant; bit 0 is no_linklocal_learn.
_IFLA_BR_MULTI_BOOLOPT = 46
_NO_LL_LEARN = struct.pack("=II", 1, 1)
_IFLA_INET6_ADDR_GEN_MODE = 8
_IN6_ADDR_GEN_MODE_NONE = 1
_IFLA_BRPORT_FLUSH, _IFLA_BRPORT_ISOLATED = 24, 33
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_RT_TABLE_LOCAL = 255
# unicast, blackhole, unreachable, prohibit: routes that say where an address belongs.
_ROUTE_TYPES = (1, 6, 7, 8)
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000

_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkError(OSError):
    """The kernel refused a request; `strerror` has its own words where it gave any."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One network interface."""

    index: int
    name: str
    kind: str
    """`bridge`, `tun`, `veth`…; empty for hardware."""
    mac: str
    master: int
    """Index of the bridge it is a port of, 0 for none."""
    up: bool
    carrier: bool
    """Of a tap: a process has it open."""
    alias: str
    """Free text that its maker wrote."""
    owner: int | None
    """Of a tap: the uid that may open it."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """An IPv4 address of this host."""

    index: int
    address: IPv4Address
    prefix: int

    @property
    def subnet(self) -> IPv4Network:
        return IPv4Network((self.address, self.prefix), strict=False)


@dataclass(frozen=True, kw_only=True)
class Route:
    """An IPv4 route of any table but `local`, which repeats the addresses."""

    destination: IPv4Network
    gateway: IPv4Address | None
    index: int
    """Of the outgoing interface, 0 where there is none (unreachable, several next hops)."""
    table: int


class Netlink:
    """A request socket to the kernel. Not for use by several threads."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._sequence = 0
        try:
            self._socket.bind((0, 0))
            # The kernel's own sentence about what was wrong, without our request repeated.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            # The kernel answers at once; a lost answer must not hold the helper for ever.
            self._socket.settimeout(20)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def do(self, kind: int, body: bytes, flags: int = 0) -> None:
        """One request that the kernel acknowledges.

        Raises:
            NetlinkError
        """
        for _ in self._exchange(kind, body, flags | _NLM_F_ACK):
            pass

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Every message of a dump, headers taken off.

        Raises:
            NetlinkError
        """
        # A dump that was interrupted by a change may miss entries: take it again.
        while True:
            interrupted = False
            found = []
            for flags, payload in self._exchange(kind, body, _NLM_F_DUMP):
                interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                found.append(payload)
            if not interrupted:
                return found

    def _exchange(self, kind: int, body: bytes, flags: int) -> Iterator[tuple[int, bytes]]:
        self._sequence += 1
        header = _HEADER.pack(
            _HEADER.size + len(body), kind, flags | _NLM_F_REQUEST, self._sequence, 0
        )
        self._socket.send(header + body)
        while True:
            data = self._receive()
            position = 0
            while position + _HEADER.size <= len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
                payload = data[position + _HEADER.size : position + length]
                position += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _check(payload, flags)
                    return
                yield flags, payload

    def _receive(self) -> bytes:
        # MSG_TRUNC with PEEK tells the size of the datagram; a dump's are up to 32 KiB or more.
        size = self._socket.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
        return self._socket.recv(size)


class Rtnetlink(Netlink):
    """The kernel's links, addresses and routes."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def add_bridge(self, name: str, mac: str) -> None:
        """Make a bridge that is down and will never have an IPv6 address.

        It learns nothing from frames to the link-local group addresses (01:80:c2:00:00:0X): they
        pass no bridge hook, so a guest could take another's address with them (br_input.c).

        Raises:
            NetlinkError: EEXIST: a link has this name.
        """
        body = (
            _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + attribute(_IFLA_IFNAME, name.encode() + b"\0")
            + attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
            + nested(
                _IFLA_LINKINFO,
                attribute(_IFLA_INFO_KIND, b"bridge")
                + nested(_IFLA_INFO_DATA, attribute(_IFLA_BR_MULTI_BOOLOPT, _NO_LL_LEARN)),
            )
        )
        self.do(_RTM_NEWLINK, body, _NLM_F_CREATE | _NLM_F_EXCL)

    def refuse_ipv6(self, index: int) -> None:
        """Let no link-local address appear when the link goes up; no IPv6 in the kernel is fine.

        Raises:
            NetlinkError
        """
        mode = attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))
        body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + nested(
            _IFLA_AF_SPEC, nested(socket.AF_INET6, mode)
        )
        try:
            self.do(_RTM_SETLINK, body)
        except NetlinkError as e:
            # The kernel has no IPv6, or it is off for this link already.
            if e.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def set_up(self, index: int) -> None:
        """Bring a link up.

        Raises:
            NetlinkError
        """
        self.do(_RTM_SETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP))

    def set_master(self, index: int, master: int) -> None:
        """Make a link a port of the bridge with index `master`.

        Raises:
            NetlinkError
        """
        body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        self.do(_RTM_SETLINK, body + attribute(_IFLA_MASTER, struct.pack("=I", master)))

    def reset_port(self, index: int, *, isolated: bool) -> None:
        """Say whether a bridge port may exchange frames with other isolated ports.

        The bridge forgets every address that it has seen behind the port.

        Raises:
            NetlinkError
        """
        body = _IFINFO.pack(socket.AF_BRIDGE, 0, index, 0, 0) + nested(
            _IFLA_PROTINFO,
            attribute(_IFLA_BRPORT_ISOLATED, bytes([isolated]))
            + attribute(_IFLA_BRPORT_FLUSH, b""),
        )
        self.do(_RTM_SETLINK, body)

    def set_alias(self, index: int, alias: str) -> None:
        """Write a text of at most 255 bytes on a link.

        Raises:
            NetlinkError
        """
        body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        self.do(_RTM_SETLINK, body + attribute(_IFLA_IFALIAS, alias.encode()))

    def add_address(self, index: int, address: IPv4Address, prefix: int) -> None:
        """Give a link an IPv4 address, with the subnet's broadcast address.

        Raises:
            NetlinkError: EEXIST: it has it already.
        """
        subnet = IPv4Network((address, prefix), strict=False)
        body = (
            _IFADDR.pack(socket.AF_INET, prefix, 0, 0, index)
            + attribute(_IFA_LOCAL, address.packed)
            + attribute(_IFA_ADDRESS, address.packed)
            + attribute(_IFA_BROADCAST, subnet.broadcast_address.packed)
        )
        self.do(_RTM_NEWADDR, body, _NLM_F_CREATE | _NLM_F_EXCL)

    def delete_link(self, index: int) -> None:
        """Delete a link. The kernel takes 20 ms for it.

        Raises:
            NetlinkError: ENODEV: there is none.
        """
        self.do(_RTM_DELLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0))

    def links(self) -> list[Link]:
        """Every link of the namespace."""
        found = []
        for body in self.dump(_RTM_GETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
            _, _, index, flags, _ = _IFINFO.unpack_from(body)
            fields = dict(attributes(body[_IFINFO.size :]))
            info = dict(attributes(fields.get(_IFLA_LINKINFO, b"")))
            kind = _text(info.get(_IFLA_INFO_KIND, b""))
            data = info.get(_IFLA_INFO_DATA, b"") if kind == "tun" else b""
            owner = dict(attributes(data)).get(_IFLA_TUN_OWNER)
            found.append(
                Link(
                    index=index,
                    name=_text(fields[_IFLA_IFNAME]),
                    kind=kind,
                    mac=fields.get(_IFLA_ADDRESS, b"").hex(":"),
                    master=_u32(fields.get(_IFLA_MASTER)),
                    up=bool(flags & _IFF_UP),
                    carrier=bool(flags & _IFF_LOWER_UP),
                    alias=_text(fields.get(_IFLA_IFALIAS, b"")),
                    owner=_u32(owner) if owner is not None else None,
                )
            )
        return found

    def find_link(self, name: str) -> Link | None:
        """The link of this name, or None."""
        return next((link for link in self.links() if link.name == name), None)

    def addresses(self) -> list[Address]:
        """Every IPv4 address of the namespace."""
        found = []
        for body in self.dump(_RTM_GETADDR, _IFADDR.pack(socket.AF_INET, 0, 0, 0, 0)):
            _, prefix, _, _, index = _IFADDR.unpack_from(body)
            fields = dict(attributes(body[_IFADDR.size :]))
            # IFA_ADDRESS is the peer's on a point-to-point link.
            local = fields.get(_IFA_LOCAL) or fields[_IFA_ADDRESS]
            found.append(Address(index=index, address=IPv4Address(local), prefix=prefix))
        return found

    def routes(self) -> list[Route]:
        """Every IPv4 route that says where addresses belong, default routes included."""
        found = []
        request = _RTMSG.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        for body in self.dump(_RTM_GETROUTE, request):
            _, length, _, _, table, _, _, kind, flags = _RTMSG.unpack_from(body)
            fields = dict(attributes(body[_RTMSG.size :]))
            table = _u32(fields.get(_RTA_TABLE)) or table
            # 0x200 is RTM_F_CLONED: a cache entry, not a route.
            if kind not in _ROUTE_TYPES or table == _RT_TABLE_LOCAL or flags & 0x200:
                continue
            gateway = fields.get(_RTA_GATEWAY)
            found.append(
                Route(
                    destination=IPv4Network((fields.get(_RTA_DST, bytes(4)), length)),
                    gateway=IPv4Address(gateway) if gateway else None,
                    index=_u32(fields.get(_RTA_OIF)),
                    table=table,
                )
            )
        return found


def _check(payload: bytes, flags: int) -> None:
    code = struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
    if code == 0:
        return
    said = ""
    # NLMSG_DONE has no copy of our header; NLMSG_ERROR has it even when it is capped.
    if flags & _NLM_F_ACK_TLVS and flags & _NLM_F_CAPPED:
        said = _text(dict(attributes(payload[4 + _HEADER.size :])).get(_NLMSGERR_ATTR_MSG, b""))
    raise NetlinkError(-code, said or os.strerror(-code))


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to the next."""
    padding = b"\0" * (-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def nested(kind: int, value: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, value)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a message or in a nested attribute: number and value."""
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")


def _u32(value: bytes | None) -> int:
    return struct.unpack("=I", value)[0] if value is not None else 0
