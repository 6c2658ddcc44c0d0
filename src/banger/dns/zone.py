"""What `.vm` says now: a name for every running VM, and its address back to the name.

Held in memory, made anew by the daemon when it starts; every change raises the serial. Answers are
kept as bytes, so that a query costs one look-up. Two kinds of zone: `vm`, and the reverse zones
that cover the bridge's subnet exactly: one for a prefix of 8, 16 or 24, several between (a /20 is
sixteen zones of a /24), so that nobody else's addresses are answered for.

Source: RFC 1034 §4.3.2 (names that only lie on the way exist), RFC 2308 (NODATA and NXDOMAIN),
RFC 8482 (ANY).
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING

from banger.dns import message as m

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAIN = "vm"
NAME_SERVER = "ns.vm"

# A reused name or address is wrong for as long as somebody remembers it.
_TTL_S = 5
# And a VM that has just started must not stay unknown because somebody was early.
_ABSENT_S = 1
_SOA_TIMES_S = (3600, 600, 86400, _ABSENT_S)

_QUESTION_NAME = b"\xc0\x0c"  # a pointer to the question, which is always at the same place

# Record type → how many records, and the records.
Node = dict[int, tuple[int, bytes]]


class Zone:
    """The names of one installation. Not shared between threads."""

    def __init__(self, subnet: ipaddress.IPv4Network) -> None:
        self._hosts: dict[str, ipaddress.IPv4Address] = {}
        self._subnet = subnet
        self._reverse = _reverse_domains(subnet)
        self._serial = int(time.time())
        self._nodes: dict[bytes, Node] = {}
        self._authority: dict[bytes, bytes] = {}
        self._rebuild()

    def reverse_domains(self) -> tuple[str, ...]:
        """The reverse zones, as a resolver's routing wants them: `0.16.172.in-addr.arpa`.

        One for the prefixes 8, 16 and 24; 128 at most.
        """
        return self._reverse

    def names(self) -> dict[str, str]:
        """What is published: name, without the domain, and address."""
        return {name: str(address) for name, address in self._hosts.items()}

    def publish(self, name: str, address: str) -> None:
        """`<name>.vm` has this address from now on, and the address no other name.

        Raises:
            ValueError: `address` is no IPv4 address, or `name` no label.
        """
        self.replace({**self._without(address), name: address})

    def withdraw(self, name: str) -> None:
        """`<name>.vm` is gone; absent is fine."""
        if name in self._hosts:
            self.replace({k: v for k, v in self.names().items() if k != name})

    def replace(self, hosts: Mapping[str, str]) -> None:
        """These are all the names there are.

        Raises:
            ValueError: as `publish`; nothing has changed then.
        """
        wanted = {name: ipaddress.IPv4Address(address) for name, address in hosts.items()}
        for name in wanted:
            if "." in name:
                raise ValueError(f"{name!r} is more than one label")
            m.encode_name(f"{name}.{DOMAIN}")
        if wanted != self._hosts:
            self._hosts = wanted
            self._serial += 1
            self._rebuild()

    def _without(self, address: str) -> dict[str, str]:
        return {name: known for name, known in self.names().items() if known != address}

    # What the server asks
    def find(self, name: bytes) -> Node | None:
        """The records of a name in wire form and lower case; None where there is no such name.

        A node without the type that is asked for is NODATA.
        """
        return self._nodes.get(name)

    def authority(self, name: bytes) -> bytes | None:
        """The SOA record of the zone that a name belongs to; None outside all of them."""
        while name:
            record = self._authority.get(name)
            if record is not None:
                return record
            name = name[1 + name[0] :]
        return None

    # How it is made
    def _rebuild(self) -> None:
        nodes: dict[bytes, Node] = {}
        authority: dict[bytes, bytes] = {}
        server = m.encode_name(NAME_SERVER)
        soa = m.soa_rdata(
            server,
            m.encode_name(f"hostmaster.{DOMAIN}"),
            serial=self._serial,
            times_s=_SOA_TIMES_S,
        )
        for domain in (DOMAIN, *self._reverse):
            apex = m.encode_name(domain)
            authority[apex] = m.format_record(
                m.Record(name=apex, rtype=m.SOA, ttl=_ABSENT_S, rdata=soa)
            )
            start = _answer(m.SOA, soa)
            nodes[apex] = {m.SOA: start, m.NS: _answer(m.NS, server), m.ANY: start}
        nodes[server] = _node(m.A, ipaddress.IPv4Address("127.0.0.1").packed)
        for name, address in self._hosts.items():
            wire = m.encode_name(f"{name}.{DOMAIN}")
            nodes[wire.lower()] = _node(m.A, address.packed)
            if address not in self._subnet:
                continue  # it got its address from a subnet that was configured before
            back = m.encode_name(address.reverse_pointer)
            # At an apex, where the subnet is so small that every address is a zone of its own.
            nodes[back] = {**nodes.get(back, {}), **_node(m.PTR, wire)}
            above = back
            while above not in authority:
                nodes.setdefault(above, {})
                above = above[1 + above[0] :]
        self._nodes, self._authority = nodes, authority


def _node(rtype: int, rdata: bytes) -> Node:
    answer = _answer(rtype, rdata)
    return {rtype: answer, m.ANY: answer}


def _answer(rtype: int, rdata: bytes) -> tuple[int, bytes]:
    record = m.Record(name=_QUESTION_NAME, rtype=rtype, ttl=_TTL_S, rdata=rdata)
    return 1, m.format_record(record)


def _reverse_domains(subnet: ipaddress.IPv4Network) -> tuple[str, ...]:
    octets = -(-subnet.prefixlen // 8)
    found = []
    for part in subnet.subnets(new_prefix=octets * 8):
        digits = str(part.network_address).split(".")[:octets]
        found.append(".".join([*reversed(digits), "in-addr.arpa"]))
    return tuple(found)
