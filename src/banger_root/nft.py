"""The two nftables tables of banger: their text, the elements of a lease, and what is in them.

`inet banger` decides what reaches the host and what is forwarded; `bridge banger` sees the taps
themselves (IP hooks see only the bridge), drops what a guest forges and marks what may be
translated. Chains never change: they match banger's names by pattern, so a link without elements
reaches nothing, and a lease is one transaction of elements. Several helpers share the tables;
whoever holds the host lock may change them. Rules are written as text for `nft -f -` only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from banger_root import process
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from banger_root.validate import LeasePlan

TABLES = ("inet", "bridge")

# Frames to the link-local group addresses (01:80:c2:00:00:0X) skip prerouting and reach `input`
# only; without a rule there the bridge learns whatever source address they claim, and a guest
# takes over another's frames (net/bridge/br_input.c, br_handle_frame, br_handle_local_finish).
#
# NAT: the IP hooks cannot tell a guest by its tap, so `bridge banger` marks the frames of taps in
# `nat_taps` and `inet banger` lets marked packets out. Every packet needs the mark, and every
# answer an address in `nat_addresses`: without the elements open connections stop, too. What
# conntrack calls invalid would leave with the guest's own address, untranslated. Link-local
# addresses (metadata services) are not routed for guests, as RFC 3927 section 7 has it.
#
# Refusals say so, that programs in a guest need not wait; what comes from outside is just dropped.
#
# `add` of what exists is no error, and `flush` with new rules in the same transaction leaves no
# moment without rules: the text can be loaded at any time. `layout` holds the hash of the text.
_RULES = """\
add table inet banger
add set inet banger layout { type mark; }
add set inet banger vm_addresses { type ipv4_addr; }
add set inet banger nat_addresses { type ipv4_addr; }
add set inet banger host_ports { type ipv4_addr . ipv4_addr . inet_service; }
add set inet banger open_guests { type ifname . ipv4_addr . ifname; }
add chain inet banger refuse
add chain inet banger guest_to_host
add chain inet banger from_guest
add chain inet banger to_guest
add chain inet banger input { type filter hook input priority filter; policy accept; }
add chain inet banger forward { type filter hook forward priority filter; policy accept; }
add chain inet banger postrouting { type nat hook postrouting priority srcnat; policy accept; }
flush chain inet banger refuse
flush chain inet banger guest_to_host
flush chain inet banger from_guest
flush chain inet banger to_guest
flush chain inet banger input
flush chain inet banger forward
flush chain inet banger postrouting
add rule inet banger refuse meta nfproto != ipv4 drop
add rule inet banger refuse ip protocol tcp tcp flags & syn == 0 reject with tcp reset
add rule inet banger refuse reject with icmp admin-prohibited
add rule inet banger guest_to_host meta nfproto != ipv4 drop
add rule inet banger guest_to_host ct state established,related accept
add rule inet banger guest_to_host ip saddr != @vm_addresses drop
add rule inet banger guest_to_host icmp type echo-request accept
add rule inet banger guest_to_host ip saddr . ip daddr . tcp dport @host_ports accept
add rule inet banger guest_to_host goto refuse
add rule inet banger from_guest ip saddr != @vm_addresses drop
add rule inet banger from_guest \
iifname . ip saddr . oifname @open_guests oifname . ip daddr . iifname @open_guests accept
add rule inet banger from_guest oifname "br-fc" goto refuse
add rule inet banger from_guest oifname "br-fc-*" goto refuse
add rule inet banger from_guest ip daddr 169.254.0.0/16 goto refuse
add rule inet banger from_guest meta mark & 0x1000 == 0 goto refuse
add rule inet banger from_guest ct state invalid,untracked drop
add rule inet banger from_guest tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
add rule inet banger from_guest accept
add rule inet banger to_guest ip daddr != @nat_addresses drop
add rule inet banger to_guest ct state != { established, related } drop
add rule inet banger to_guest tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
add rule inet banger to_guest accept
add rule inet banger input iifname "br-fc" goto guest_to_host
add rule inet banger input iifname "br-fc-*" goto guest_to_host
add rule inet banger forward iifname "br-fc" goto from_guest
add rule inet banger forward iifname "br-fc-*" goto from_guest
add rule inet banger forward oifname "br-fc" goto to_guest
add rule inet banger forward oifname "br-fc-*" goto to_guest
add rule inet banger postrouting oifname "br-fc" return
add rule inet banger postrouting oifname "br-fc-*" return
add rule inet banger postrouting meta mark & 0x1000 == 0x1000 ip saddr @nat_addresses masquerade
add table bridge banger
add set bridge banger vm_ports { type ifname . ether_addr . ipv4_addr; }
add set bridge banger nat_taps { type ifname; }
add set bridge banger open_ports { type ifname; }
add chain bridge banger source
add chain bridge banger own
add chain bridge banger from_tap
add chain bridge banger between
add chain bridge banger prerouting { type filter hook prerouting priority dstnat; policy accept; }
add chain bridge banger input { type filter hook input priority filter; policy accept; }
add chain bridge banger forward { type filter hook forward priority filter; policy accept; }
flush chain bridge banger source
flush chain bridge banger own
flush chain bridge banger from_tap
flush chain bridge banger between
flush chain bridge banger prerouting
flush chain bridge banger input
flush chain bridge banger forward
add rule bridge banger source meta mark set meta mark & 0xffffefff
add rule bridge banger source ether type ip iifname . ether saddr . ip saddr @vm_ports goto own
add rule bridge banger source ether type arp iifname . ether saddr . arp saddr ip @vm_ports \
iifname . arp saddr ether . arp saddr ip @vm_ports accept
add rule bridge banger source drop
add rule bridge banger own iifname @nat_taps meta mark set meta mark | 0x1000
add rule bridge banger own accept
add rule bridge banger from_tap oifname "tap-fc-*" goto between
add rule bridge banger from_tap oifname "tap-pool-*" goto between
add rule bridge banger between iifname @open_ports oifname @open_ports accept
add rule bridge banger between drop
add rule bridge banger prerouting iifname "tap-fc-*" goto source
add rule bridge banger prerouting iifname "tap-pool-*" goto source
add rule bridge banger input iifname "tap-fc-*" goto source
add rule bridge banger input iifname "tap-pool-*" goto source
add rule bridge banger forward iifname "tap-fc-*" goto from_tap
add rule bridge banger forward iifname "tap-pool-*" goto from_tap
flush set inet banger layout
"""
_HASH = f"0x{hashlib.sha256(_RULES.encode()).hexdigest()[:8]}"
LAYOUT = f"{_RULES}add element inet banger layout {{ {_HASH} }}\n"

# Fails with ENOENT where the rules are not there or not these.
_CHECK = f"""\
delete element inet banger layout {{ {_HASH} }}
add element inet banger layout {{ {_HASH} }}
"""

# Deleting what is absent fails the whole transaction, so each is added first.
REMOVAL = """\
add table inet banger
delete table inet banger
add table bridge banger
delete table bridge banger
"""


@dataclass(frozen=True, kw_only=True, order=True)
class Element:
    """One element of one of our sets; `parts` as nft prints them."""

    family: str
    set_name: str
    parts: tuple[str, ...]

    def format(self, verb: str) -> str:
        """The line `<verb> element …` (nft(8), ELEMENT COMMANDS)."""
        value = " . ".join(f'"{p}"' if _is_name(p) else p for p in self.parts)
        return f"{verb} element {self.family} banger {self.set_name} {{ {value} }}\n"


def build_elements(plan: LeasePlan, tap: str) -> tuple[Element, ...]:
    """The elements of a lease. `vm_ports` is the only one that names the tap of every lease."""
    bridge, address = plan.bridge, str(plan.address)
    elements = [
        Element(family="bridge", set_name="vm_ports", parts=(tap, plan.mac, address)),
        Element(family="inet", set_name="vm_addresses", parts=(address,)),
    ]
    elements += [
        Element(
            family="inet",
            set_name="host_ports",
            parts=(address, str(bridge.address), str(port)),
        )
        for port in plan.host_ports
    ]
    if plan.nat:
        elements += [
            Element(family="bridge", set_name="nat_taps", parts=(tap,)),
            Element(family="inet", set_name="nat_addresses", parts=(address,)),
        ]
    if not plan.isolate:
        elements += [
            Element(family="bridge", set_name="open_ports", parts=(tap,)),
            # The bridge twice: only what stays on it is let through, never to another one.
            Element(
                family="inet", set_name="open_guests", parts=(bridge.name, address, bridge.name)
            ),
        ]
    return tuple(elements)


def load_layout() -> None:
    """Load the tables and rules, whatever is there; elements stay.

    Raises:
        HelperError: nft failed.
    """
    _apply("loading banger's rules", LAYOUT)


def ensure_layout() -> None:
    """Load the tables and rules where they are not there or not these.

    Raises:
        HelperError: nft failed.
    """
    _apply_with_layout("loading banger's rules", "")


def add_elements(plan: LeasePlan, tap: str) -> None:
    """Add a lease's elements in one transaction, with the rules where those are missing.

    Raises:
        HelperError: already_exists where the address belongs to another lease on this host.
    """
    _change(plan, tap, add=build_elements(plan, tap), delete=())


def sync_elements(plan: LeasePlan, tap: str) -> bool:
    """Make the elements of a lease that is there what its plan says, in one transaction.

    Returns whether anything had to be done.

    Raises:
        HelperError: already_exists where the address belongs to another lease on this host.
    """
    present = read_elements()
    wanted = frozenset(build_elements(plan, tap))
    ours = select_ours(plan, tap, present or frozenset())
    if present is not None and ours == wanted:
        return False
    _change(plan, tap, add=sorted(wanted - ours), delete=sorted(ours - wanted))
    return True


def remove_elements(plan: LeasePlan, tap: str) -> None:
    """Delete what is there of a lease's elements in one transaction, nothing of another's.

    Raises:
        HelperError: nft failed.
    """
    doing = f"deleting the nft elements of {tap}"
    try:
        # Whole or not at all: with the one that names our tap, the others are ours as well.
        _apply(doing, _format("delete", build_elements(plan, tap)))
        return
    except process.ProgramFailed as e:
        if "No such file or directory" not in e.stderr:
            raise
    ours = select_ours(plan, tap, read_elements() or frozenset())
    if ours:
        _apply(doing, _format("delete", sorted(ours)))


def remove_stale_elements(links: Iterable[str]) -> int:
    """Delete elements that no tap among these links stands behind; how many there were.

    Raises:
        HelperError: nft failed.
    """
    stale = find_stale(read_elements() or frozenset(), frozenset(links))
    if stale:
        _apply("deleting stale nft elements", _format("delete", sorted(stale)))
    return len(stale)


def remove_tables_if_unused(links: Iterable[str]) -> None:
    """Delete the tables where no element is left, and no tap that the rules keep mute.

    Raises:
        HelperError: nft failed.
    """
    if any(name.startswith(("tap-fc-", "tap-pool-")) for name in links):
        return
    present = read_elements()
    if present is not None and not present:
        _apply("deleting banger's tables", REMOVAL)


def find_stale(present: frozenset[Element], links: frozenset[str]) -> frozenset[Element]:
    """Those elements that belong to no port of a link that exists."""
    ports = {e for e in present if e.set_name == "vm_ports" and e.parts[0] in links}
    taps = {e.parts[0] for e in ports}
    addresses = {e.parts[2] for e in ports}
    return frozenset(e for e in present - ports if not _holder(e) & (taps | addresses))


def select_ours(plan: LeasePlan, tap: str, present: frozenset[Element]) -> frozenset[Element]:
    """Those of the elements in the kernel that belong to this lease, with NAT or without."""
    address = str(plan.address)
    holders = {e.parts[0] for e in present if e.set_name == "vm_ports" and e.parts[2] == address}
    # Another ledger's lease may hold the address; then what carries only the address is its own.
    foreign = bool(holders - {tap})
    whole = replace(plan, nat=True, isolate=False)
    wanted = (e for e in build_elements(whole, tap) if not (foreign and e.family == "inet"))
    return present.intersection(wanted)


def nat_addresses() -> list[IPv4Address]:
    """The guests that have NAT, of whichever ledger.

    Raises:
        HelperError: nft failed.
    """
    present = read_elements() or frozenset()
    return [IPv4Address(e.parts[0]) for e in present if e.set_name == "nat_addresses"]


def read_elements() -> frozenset[Element] | None:
    """Every element of our sets, as the kernel has them; None where neither table exists.

    Raises:
        HelperError: nft failed.
    """
    documents = [(family, _read_table(family)) for family in TABLES]
    if all(document is None for _, document in documents):
        return None
    return frozenset(
        element
        for family, document in documents
        if document is not None
        for element in _parse_elements(family, document)
    )


def _read_table(family: str) -> dict[str, Any] | None:
    try:
        text = process.run("nft", ["-j", "list", "table", family, "banger"])
    except process.ProgramFailed as e:
        if "No such file or directory" in e.stderr:
            return None
        raise
    document = json.loads(text)
    assert type(document) is dict
    return document


def _parse_elements(family: str, document: dict[str, Any]) -> Iterator[Element]:
    for item in document["nftables"]:
        if "set" not in item or item["set"]["name"] == "layout":
            continue
        for element in item["set"].get("elem", ()):
            # With a counter or comment the value is wrapped once more (libnftables-json(5)).
            wrapped = type(element) is dict and "elem" in element
            value = element["elem"]["val"] if wrapped else element
            parts = value["concat"] if type(value) is dict else [value]
            yield Element(
                family=family,
                set_name=item["set"]["name"],
                parts=tuple(str(part) for part in parts),
            )


def _change(
    plan: LeasePlan, tap: str, *, add: Iterable[Element], delete: Iterable[Element]
) -> None:
    doing = f"changing the nft elements of {tap}"
    try:
        # `create`, unlike `add`, fails on an element that exists: another ledger's lease has it.
        _apply_with_layout(doing, _format("delete", delete) + _format("create", add))
    except process.ProgramFailed as e:
        if "File exists" not in e.stderr:
            raise
        raise HelperError(
            "already_exists",
            f"{doing}: the address {plan.address} belongs to another lease on this host",
            hint="sudo nft list set bridge banger vm_ports",
            reason="in_use",
        ) from e


def _apply_with_layout(doing: str, text: str) -> None:
    try:
        _apply(doing, _CHECK + text)
    except process.ProgramFailed as e:
        if "No such file or directory" not in e.stderr:
            raise
        _apply(doing, LAYOUT + text)


def _format(verb: str, elements: Iterable[Element]) -> str:
    return "".join(e.format(verb) for e in elements)


def _holder(element: Element) -> set[str]:
    """The tap or the address in whose name an element exists."""
    return {element.parts[1 if element.set_name == "open_guests" else 0]}


def _apply(doing: str, text: str) -> None:
    try:
        process.run("nft", ["-f", "-"], stdin=text)
    except HelperError as e:
        e.message = f"{doing}: {e.message}"
        raise


def _is_name(part: str) -> bool:
    """Interface names are quoted: nft has keywords that look like them."""
    if ":" in part or part.isdigit():
        return False
    try:
        IPv4Address(part)
    except ValueError:
        return True
    return False
