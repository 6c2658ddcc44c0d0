"""The two nftables tables of banger: their text, the elements of a lease, and what is in them.

`inet banger` decides what reaches the host and what is forwarded; `bridge banger` sees the taps
themselves (IP hooks see only the bridge) and drops what a guest forges. Chains never change: they
match banger's names by pattern, so a link without elements reaches nothing, and a lease is one
transaction of elements. Several helpers share the tables; whoever holds the host lock (`leases`)
may change them. Rules are written as text for `nft -f -` only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from banger_root import process
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger_root.validate import LeasePlan

TABLES = ("inet", "bridge")

# Frames to the link-local group addresses (01:80:c2:00:00:0X) skip prerouting and reach `input`
# only; without a rule there the bridge learns whatever source address they claim, and a guest
# takes over another's frames (net/bridge/br_input.c, br_handle_frame, br_handle_local_finish).
#
# `add` of what exists is no error, and `flush` with new rules in the same transaction leaves no
# moment without rules: the text can be loaded at any time.
LAYOUT = """\
add table inet banger
add set inet banger vm_addresses { type ipv4_addr; }
add set inet banger host_ports { type ipv4_addr . ipv4_addr . inet_service; }
add set inet banger open_guests { type ifname . ipv4_addr . ifname; }
add chain inet banger guest_to_host
add chain inet banger from_guest
add chain inet banger to_guest
add chain inet banger input { type filter hook input priority filter; policy accept; }
add chain inet banger forward { type filter hook forward priority filter; policy accept; }
flush chain inet banger guest_to_host
flush chain inet banger from_guest
flush chain inet banger to_guest
flush chain inet banger input
flush chain inet banger forward
add rule inet banger guest_to_host meta nfproto != ipv4 drop
add rule inet banger guest_to_host ct state established,related accept
add rule inet banger guest_to_host ip saddr != @vm_addresses drop
add rule inet banger guest_to_host icmp type echo-request accept
add rule inet banger guest_to_host ip saddr . ip daddr . tcp dport @host_ports accept
add rule inet banger guest_to_host drop
add rule inet banger from_guest \
iifname . ip saddr . oifname @open_guests oifname . ip daddr . iifname @open_guests accept
add rule inet banger from_guest drop
add rule inet banger to_guest ct state established,related accept
add rule inet banger to_guest drop
add rule inet banger input iifname "br-fc" goto guest_to_host
add rule inet banger input iifname "br-fc-*" goto guest_to_host
add rule inet banger forward iifname "br-fc" goto from_guest
add rule inet banger forward iifname "br-fc-*" goto from_guest
add rule inet banger forward oifname "br-fc" goto to_guest
add rule inet banger forward oifname "br-fc-*" goto to_guest
add table bridge banger
add set bridge banger vm_ports { type ifname . ether_addr . ipv4_addr; }
add set bridge banger open_ports { type ifname; }
add chain bridge banger source
add chain bridge banger between
add chain bridge banger prerouting { type filter hook prerouting priority dstnat; policy accept; }
add chain bridge banger input { type filter hook input priority filter; policy accept; }
add chain bridge banger forward { type filter hook forward priority filter; policy accept; }
flush chain bridge banger source
flush chain bridge banger between
flush chain bridge banger prerouting
flush chain bridge banger input
flush chain bridge banger forward
add rule bridge banger source ether type ip iifname . ether saddr . ip saddr @vm_ports accept
add rule bridge banger source ether type arp iifname . ether saddr . arp saddr ip @vm_ports \
iifname . arp saddr ether . arp saddr ip @vm_ports accept
add rule bridge banger source drop
add rule bridge banger between iifname @open_ports oifname @open_ports accept
add rule bridge banger between drop
add rule bridge banger prerouting iifname "tap-fc-*" goto source
add rule bridge banger input iifname "tap-fc-*" goto source
add rule bridge banger forward iifname "tap-fc-*" oifname "tap-fc-*" goto between
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


def build_elements(plan: LeasePlan) -> tuple[Element, ...]:
    """The elements of a lease. `vm_ports` is the only one that names the tap of every lease."""
    bridge, address = plan.bridge, str(plan.address)
    port = (plan.own_tap, plan.mac, address)
    elements = [
        Element(family="bridge", set_name="vm_ports", parts=port),
        Element(family="inet", set_name="vm_addresses", parts=(address,)),
        Element(
            family="inet",
            set_name="host_ports",
            parts=(address, str(bridge.address), str(plan.announce_port)),
        ),
    ]
    if not plan.isolate:
        elements += [
            Element(family="bridge", set_name="open_ports", parts=(plan.own_tap,)),
            # The bridge twice: only what stays on it is let through, never to another one.
            Element(
                family="inet", set_name="open_guests", parts=(bridge.name, address, bridge.name)
            ),
        ]
    return tuple(elements)


def add_elements(plan: LeasePlan, *, with_layout: bool) -> None:
    """Add a lease's elements in one transaction; the tables too where missing or asked for.

    Raises:
        HelperError: already_exists where the address belongs to another lease on this host.
    """
    # `create`, unlike `add`, fails on an element that exists: another ledger's lease has it.
    text = "".join(e.format("create") for e in build_elements(plan))
    doing = f"adding the nft elements of {plan.own_tap}"
    try:
        try:
            _apply(doing, (LAYOUT if with_layout else "") + text)
        except process.ProgramFailed as e:
            if with_layout or "No such file or directory" not in e.stderr:
                raise
            _apply(doing, LAYOUT + text)
    except process.ProgramFailed as e:
        if "File exists" not in e.stderr:
            raise
        raise HelperError(
            "already_exists",
            f"{doing}: the address {plan.address} belongs to another lease on this host",
            hint="sudo nft list set bridge banger vm_ports",
            reason="in_use",
        ) from e


def remove_elements(plan: LeasePlan) -> None:
    """Delete what is there of a lease's elements in one transaction, nothing of another's.

    With the last element of all leases on this host the tables go too.

    Raises:
        HelperError: nft failed.
    """
    present = read_elements()
    if present is None:
        return
    ours = select_ours(plan, present)
    if present == ours:
        _apply("deleting banger's tables", REMOVAL)
    elif ours:
        text = "".join(e.format("delete") for e in sorted(ours))
        _apply(f"deleting the nft elements of {plan.own_tap}", text)


def select_ours(plan: LeasePlan, present: frozenset[Element]) -> frozenset[Element]:
    """Those of the elements in the kernel that belong to this lease."""
    address = str(plan.address)
    holders = {e.parts[0] for e in present if e.set_name == "vm_ports" and e.parts[2] == address}
    # Another ledger's lease may hold the address; then what carries only the address is its own.
    foreign = bool(holders - {plan.own_tap})
    wanted = (e for e in build_elements(plan) if not (foreign and e.family == "inet"))
    return present.intersection(wanted)


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
        if "set" not in item:
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
