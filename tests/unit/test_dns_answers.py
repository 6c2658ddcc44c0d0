"""What the name server says, judged by dnspython."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest

from banger.dns.answer import respond
from banger.dns.zone import Zone

SUBNET = IPv4Network("172.16.0.0/24")


@pytest.fixture
def zone() -> Zone:
    zone = Zone(SUBNET)
    zone.replace({"web": "172.16.0.2", "db-1": "172.16.0.3"})
    return zone


def ask(
    zone: Zone, name: str, rtype: str = "A", *, udp: bool = True, **options: object
) -> dns.message.Message:
    query = dns.message.make_query(name, rtype, **options)  # type: ignore[arg-type]
    wire = respond(zone, query.to_wire(), udp=udp)
    assert wire is not None
    reply = dns.message.from_wire(wire)
    assert query.is_response(reply)
    return reply


def texts(section: Sequence[object]) -> list[str]:
    return [str(rrset) for rrset in section]


def test_a_running_vm_has_its_address(zone: Zone) -> None:
    reply = ask(zone, "web.vm")
    assert texts(reply.answer) == ["web.vm. 5 IN A 172.16.0.2"]
    assert reply.rcode() == dns.rcode.NOERROR
    assert reply.flags & dns.flags.AA
    assert not reply.flags & dns.flags.RA


def test_case_is_kept_in_the_answer_and_not_looked_at(zone: Zone) -> None:
    wire = respond(zone, dns.message.make_query("wEb.Vm", "A").to_wire(), udp=True)
    assert wire is not None
    assert b"\3wEb\2Vm\0" in wire
    assert texts(dns.message.from_wire(wire).answer) == ["wEb.Vm. 5 IN A 172.16.0.2"]


@pytest.mark.parametrize("rtype", ["AAAA", "TXT", "MX", "HTTPS", "SOA"])
def test_a_name_without_that_type_is_nodata_with_the_zones_soa(zone: Zone, rtype: str) -> None:
    reply = ask(zone, "web.vm", rtype)
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])
    (soa,) = reply.authority
    assert (str(soa.name), soa.rdtype, soa.ttl) == ("vm.", dns.rdatatype.SOA, 1)


@pytest.mark.parametrize("name", ["nobody.vm", "a.web.vm", "vm.vm", "web.web.vm", r"we\098x.vm"])
def test_an_unknown_name_is_nxdomain_with_the_zones_soa(zone: Zone, name: str) -> None:
    reply = ask(zone, name)
    assert (reply.rcode(), reply.answer) == (dns.rcode.NXDOMAIN, [])
    assert str(reply.authority[0].name) == "vm."


def test_an_address_leads_back_to_its_name(zone: Zone) -> None:
    reply = ask(zone, "3.0.16.172.in-addr.arpa", "PTR")
    assert texts(reply.answer) == ["3.0.16.172.in-addr.arpa. 5 IN PTR db-1.vm."]
    reply = ask(zone, "9.0.16.172.in-addr.arpa", "PTR")
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert str(reply.authority[0].name) == "0.16.172.in-addr.arpa."


@pytest.mark.parametrize("apex", ["vm", "0.16.172.in-addr.arpa"])
def test_each_zone_has_soa_and_ns_at_its_apex(zone: Zone, apex: str) -> None:
    (soa,) = ask(zone, apex, "SOA").answer
    assert str(soa[0]).startswith("ns.vm. hostmaster.vm. ")
    (ns,) = ask(zone, apex, "NS").answer
    assert str(ns[0]) == "ns.vm."
    assert ask(zone, apex, "A").rcode() == dns.rcode.NOERROR
    assert texts(ask(zone, "ns.vm").answer) == ["ns.vm. 5 IN A 127.0.0.1"]


@pytest.mark.parametrize(
    "name", [".", "example.com", "avm", "1.1.16.172.in-addr.arpa", "16.172.in-addr.arpa"]
)
def test_names_outside_both_zones_are_refused(zone: Zone, name: str) -> None:
    reply = ask(zone, name)
    assert (reply.rcode(), reply.answer, reply.authority) == (dns.rcode.REFUSED, [], [])
    assert not reply.flags & dns.flags.AA


@pytest.mark.parametrize(("rtype", "rdclass"), [("AXFR", "IN"), ("A", "CH"), ("A", "ANY")])
def test_transfers_and_other_classes_are_refused(zone: Zone, rtype: str, rdclass: str) -> None:
    assert ask(zone, "web.vm", rtype, rdclass=rdclass).rcode() == dns.rcode.REFUSED


def test_any_gives_one_kind_of_record(zone: Zone) -> None:
    assert texts(ask(zone, "web.vm", "ANY").answer) == ["web.vm. 5 IN A 172.16.0.2"]
    assert len(ask(zone, "vm", "ANY").answer) == 1


@pytest.mark.parametrize("opcode", ["IQUERY", "STATUS", "NOTIFY", "UPDATE"])
def test_other_opcodes_are_not_implemented(zone: Zone, opcode: str) -> None:
    query = dns.message.make_query("web.vm", "A")
    query.set_opcode(dns.opcode.from_text(opcode))
    wire = respond(zone, query.to_wire(), udp=True)
    assert wire is not None
    reply = dns.message.from_wire(wire)
    assert (reply.rcode(), reply.opcode()) == (dns.rcode.NOTIMP, query.opcode())


QUERY = dns.message.make_query("web.vm", "A", id=0x1234).to_wire()
HEADER, QUESTION = QUERY[:12], QUERY[12:]


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(HEADER, id="no question"),
        pytest.param(QUERY[:-1], id="cut off"),
        pytest.param(QUERY + b"\0", id="bytes after the end"),
        pytest.param(HEADER[:4] + b"\0\2" + HEADER[6:] + QUESTION * 2, id="two questions"),
        pytest.param(HEADER[:4] + b"\0\0" + HEADER[6:] + QUESTION, id="none is announced"),
        pytest.param(HEADER + b"\xc0\x0c\0\1\0\1", id="a name that points to itself"),
        pytest.param(HEADER + b"\x41" + b"a" * 65 + b"\0\0\1\0\1", id="a label of another type"),
        pytest.param(HEADER + b"\x3fa" * 200, id="a name that is too long"),
        pytest.param(HEADER[:10] + b"\0\2" + QUESTION + b"\0\0\x29\4\xd0\0\0\0\0\0\0" * 2,
                     id="two OPT records"),
        pytest.param(HEADER[:10] + b"\0\1" + QUESTION + b"\1a\0\0\x29\4\xd0\0\0\0\0\0\0",
                     id="an OPT record with a name"),
    ],
)  # fmt: skip
def test_junk_behind_a_header_is_a_format_error(zone: Zone, wire: bytes) -> None:
    reply = respond(zone, wire, udp=True)
    assert reply is not None
    parsed = dns.message.from_wire(reply)
    assert (parsed.id, parsed.rcode()) == (0x1234, dns.rcode.FORMERR)


def test_replies_and_scraps_are_not_answered(zone: Zone) -> None:
    query = dns.message.make_query("web.vm", "A")
    query.flags |= dns.flags.QR
    assert respond(zone, query.to_wire(), udp=True) is None
    assert respond(zone, b"", udp=True) is None
    assert respond(zone, QUERY[:11], udp=True) is None


def test_edns_is_answered_in_kind_and_only_then(zone: Zone) -> None:
    assert ask(zone, "web.vm").edns == -1
    reply = ask(zone, "web.vm", use_edns=0, payload=4096, want_dnssec=True)
    assert (reply.edns, reply.payload) == (0, 1232)
    assert reply.ednsflags & dns.flags.DO
    assert not ask(zone, "web.vm", use_edns=0).ednsflags & dns.flags.DO


def test_options_of_edns_are_read_over(zone: Zone) -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    assert ask(zone, "web.vm", use_edns=0, options=[cookie]).answer


def test_another_version_of_edns_is_told_ours(zone: Zone) -> None:
    reply = ask(zone, "web.vm", use_edns=1)
    assert (reply.rcode(), reply.edns, reply.answer) == (dns.rcode.BADVERS, 0, [])


def test_a_reply_that_is_too_long_for_a_datagram_sets_tc_and_is_whole_over_tcp() -> None:
    zone = Zone(SUBNET)
    zone.replace({"web": "172.16.0.2"})
    long = "x" * 63 + "." + "y" * 63 + "." + "z" * 63 + "." + "w" * 50 + ".web.vm"
    # No real reply is that long: one record made bigger says what would happen.
    zone._authority = {name: soa * 10 for name, soa in zone._authority.items()}
    query = dns.message.make_query(long, "A", use_edns=0, payload=512).to_wire()
    short = respond(zone, query, udp=True)
    whole = respond(zone, query, udp=False)
    assert short is not None
    assert whole is not None
    assert len(short) <= 512 < len(whole)
    parsed = dns.message.from_wire(short)
    assert parsed.flags & dns.flags.TC
    assert (parsed.answer, parsed.authority, parsed.edns) == ([], [], 0)
    assert parsed.rcode() == dns.rcode.NXDOMAIN


def test_what_is_published_and_withdrawn_is_there_and_gone(zone: Zone) -> None:
    zone.publish("new", "172.16.0.9")
    assert texts(ask(zone, "new.vm").answer) == ["new.vm. 5 IN A 172.16.0.9"]
    zone.withdraw("new")
    zone.withdraw("never-there")
    assert ask(zone, "new.vm").rcode() == dns.rcode.NXDOMAIN
    assert ask(zone, "9.0.16.172.in-addr.arpa", "PTR").rcode() == dns.rcode.NXDOMAIN
    assert ask(zone, "web.vm").answer


def test_an_address_has_one_name_the_last(zone: Zone) -> None:
    zone.publish("newer", "172.16.0.2")
    assert ask(zone, "web.vm").rcode() == dns.rcode.NXDOMAIN
    assert str(ask(zone, "2.0.16.172.in-addr.arpa", "PTR").answer[0][0]) == "newer.vm."


def test_the_serial_rises_with_every_change_and_only_then(zone: Zone) -> None:
    def serial() -> int:
        return int(ask(zone, "vm", "SOA").answer[0][0].serial)

    before = serial()
    zone.publish("web", "172.16.0.2")
    assert serial() == before
    zone.publish("web", "172.16.0.7")
    assert serial() == before + 1


def test_what_cannot_be_a_name_or_an_address_changes_nothing(zone: Zone) -> None:
    for name, address in (("web", "::1"), ("a.b", "172.16.0.9"), ("", "172.16.0.9"),
                          ("x" * 64, "172.16.0.9"), ("é", "172.16.0.9")):  # fmt: skip
        with pytest.raises(ValueError):
            zone.publish(name, address)
    assert zone.names() == {"web": "172.16.0.2", "db-1": "172.16.0.3"}


@pytest.mark.parametrize(
    ("subnet", "count", "first", "inside", "outside"),
    [
        ("10.0.0.0/8", 1, "10.in-addr.arpa", "10.200.3.4", "11.0.0.1"),
        ("172.16.0.0/12", 16, "16.172.in-addr.arpa", "172.31.0.9", "172.32.0.1"),
        ("192.168.0.0/16", 1, "168.192.in-addr.arpa", "192.168.77.2", "192.169.0.1"),
        ("172.16.32.0/20", 16, "32.16.172.in-addr.arpa", "172.16.47.9", "172.16.48.1"),
        ("172.16.0.0/23", 2, "0.16.172.in-addr.arpa", "172.16.1.9", "172.16.2.1"),
        ("172.16.0.0/24", 1, "0.16.172.in-addr.arpa", "172.16.0.254", "172.16.1.1"),
        ("172.16.0.128/25", 128, "128.0.16.172.in-addr.arpa", "172.16.0.130", "172.16.0.2"),
        ("172.16.0.4/30", 4, "4.0.16.172.in-addr.arpa", "172.16.0.6", "172.16.0.9"),
    ],
)
def test_the_reverse_zones_cover_the_subnet_exactly(
    subnet: str, count: int, first: str, inside: str, outside: str
) -> None:
    zone = Zone(IPv4Network(subnet))
    zone.publish("web", inside)
    domains = zone.reverse_domains()
    assert (len(domains), domains[0]) == (count, first)
    for domain in domains:
        assert ask(zone, domain, "SOA").answer
    back = ".".join(reversed(inside.split("."))) + ".in-addr.arpa"
    assert str(ask(zone, back, "PTR").answer[0][0]) == "web.vm."
    away = ".".join(reversed(outside.split("."))) + ".in-addr.arpa"
    assert ask(zone, away, "PTR").rcode() == dns.rcode.REFUSED
    # An address outside, from before the subnet was changed, still has its name.
    zone.publish("old", outside)
    assert ask(zone, "old.vm").answer
    assert ask(zone, away, "PTR").rcode() == dns.rcode.REFUSED


def test_a_name_on_the_way_to_an_address_exists_while_the_address_does() -> None:
    zone = Zone(IPv4Network("10.0.0.0/8"))
    zone.publish("web", "10.1.2.3")
    for between in ("2.1.10.in-addr.arpa", "1.10.in-addr.arpa"):
        reply = ask(zone, between, "PTR")
        assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])
    assert ask(zone, "9.1.10.in-addr.arpa", "PTR").rcode() == dns.rcode.NXDOMAIN
    zone.withdraw("web")
    assert ask(zone, "1.10.in-addr.arpa", "PTR").rcode() == dns.rcode.NXDOMAIN
