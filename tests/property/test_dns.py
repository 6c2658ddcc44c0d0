"""DNS messages: what dnspython writes we read, what we write it reads, and junk breaks nothing."""

from __future__ import annotations

from ipaddress import IPv4Network

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.dns import message as m
from banger.dns.answer import respond
from banger.dns.zone import Zone

ZONE = Zone(IPv4Network("172.16.0.0/24"))
ZONE.replace({"web": "172.16.0.2", "a-b": "172.16.0.3"})

LABEL = st.binary(min_size=1, max_size=63)
NAME = (
    st.lists(LABEL, max_size=6)
    .map(lambda labels: b"".join(bytes([len(x)]) + x for x in labels) + b"\0")
    .filter(lambda wire: len(wire) <= 255)
)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
# A type of which dnspython knows no inner structure, so that any bytes are its data.
OPAQUE = st.integers(0xFF00, 0xFFFE)
RECORD = st.builds(
    m.Record, name=NAME, rtype=OPAQUE, rclass=st.just(m.IN), ttl=st.integers(0, 0x7FFFFFFF),
    rdata=st.binary(max_size=40),
)  # fmt: skip
SECTION = st.lists(RECORD, max_size=3).map(tuple)
MESSAGE = st.builds(
    m.Message,
    id=U16,
    flags=U16.map(lambda f: f & ~m.OPCODE),
    questions=st.lists(
        st.builds(m.Question, name=NAME, rtype=OPAQUE, rclass=st.just(m.IN)), max_size=2
    ).map(tuple),
    answers=SECTION,
    authority=SECTION,
    additional=SECTION,
)
WHERE = st.sampled_from(["web.vm.", "WEB.vm.", "no.vm.", "vm.", "2.0.16.172.in-addr.arpa.", "x.y."])


@given(MESSAGE)
def test_a_message_survives_the_way_there_and_back(message: m.Message) -> None:
    assert m.parse_message(m.format_message(message)) == message


def wire_of(name: dns.name.Name) -> bytes:
    wire = name.to_wire()
    assert wire is not None
    return wire


def keys(section: list[dns.rrset.RRset]) -> list[tuple[bytes, int, int, bytes]]:
    return [
        (wire_of(rrset.name), rrset.rdtype, rrset.ttl, rdata.to_wire())
        for rrset in section
        for rdata in rrset
    ]


@given(MESSAGE)
def test_what_we_write_dnspython_reads(message: m.Message) -> None:
    theirs = dns.message.from_wire(m.format_message(message), one_rr_per_rrset=True)
    assert theirs.id == message.id
    assert int(theirs.flags) == message.flags
    assert [q.name.to_wire() for q in theirs.question] == [q.name for q in message.questions]
    for ours, section in (
        (message.answers, theirs.answer),
        (message.authority, theirs.authority),
        (message.additional, theirs.additional),
    ):
        assert keys(section) == [(r.name, r.rtype, r.ttl, r.rdata) for r in ours]


@given(
    name=NAME,
    rtype=st.sampled_from(["A", "AAAA", "PTR", "SOA", "NS", "ANY", "TXT"]),
    payload=U16,
    edns=st.booleans(),
    names=st.lists(NAME, min_size=1, max_size=4),
)
def test_what_dnspython_writes_and_compresses_we_read(
    name: bytes, rtype: str, payload: int, edns: bool, names: list[bytes]
) -> None:
    question = dns.name.from_wire(name, 0)[0]
    theirs = dns.message.make_query(question, rtype, use_edns=edns, payload=payload)
    response = dns.message.make_response(theirs)
    for other in names:
        for owner in (question, dns.name.from_wire(other, 0)[0]):
            rrset = response.find_rrset(
                response.answer, owner, dns.rdataclass.IN, dns.rdatatype.A, create=True
            )
            rrset.add(dns.rdata.from_text("IN", "A", "192.0.2.1"), 7)
    for message in (theirs, response):
        ours = m.parse_message(message.to_wire(max_size=65535))
        assert ours.id == message.id
        assert [q.name for q in ours.questions] == [name]
        # Pointers go to names that differ in case: a name is the same without it.
        assert [r.name.lower() for r in ours.answers] == [
            wire_of(rrset.name).lower() for rrset in message.answer
        ]
        opt = m.find_opt(ours)
        assert (opt is not None) == edns
        if message is theirs and opt is not None:
            assert opt.rclass == payload


@given(st.binary(max_size=300))
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\xc0\x0c" + b"\0\1\0\1")
def test_bytes_are_a_message_or_a_format_error(wire: bytes) -> None:
    try:
        m.parse_message(wire)
    except m.FormatError:
        return


@given(
    name=NAME | WHERE.map(lambda text: dns.name.from_text(text).to_wire()),
    rtype=U16 | st.sampled_from([1, 2, 6, 12, 28, 255]),
    rclass=st.just(1) | U16,
    head=st.tuples(U16, U16.map(lambda f: f & ~(m.QR | m.OPCODE))),
    edns=st.none() | st.tuples(U16, U32, st.binary(max_size=20)),
    udp=st.booleans(),
)
def test_every_query_has_a_reply_that_dnspython_reads(
    name: bytes,
    rtype: int,
    rclass: int,
    head: tuple[int, int],
    edns: tuple[int, int, bytes] | None,
    udp: bool,
) -> None:
    opt = (
        ()
        if edns is None
        else (m.Record(name=b"\0", rtype=m.OPT, rclass=edns[0], ttl=edns[1], rdata=edns[2]),)
    )
    query = m.Message(
        id=head[0],
        flags=head[1],
        questions=(m.Question(name=name, rtype=rtype, rclass=rclass),),
        additional=opt,
    )
    wire = respond(ZONE, m.format_message(query), udp=udp)
    assert wire is not None
    reply = dns.message.from_wire(wire)
    assert reply.id == head[0]
    assert reply.rcode() in (
        dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.REFUSED, dns.rcode.BADVERS,
    )  # fmt: skip
    assert wire[12 : 12 + len(name)] == name
    assert (reply.edns >= 0) == (edns is not None)
    if udp:
        assert len(wire) <= (1232 if edns else 512)
    assert m.parse_message(wire).rcode == reply.rcode()


QUERY = dns.message.make_query("web.vm", "A", use_edns=0).to_wire()


@given(
    st.binary(max_size=80)
    | st.tuples(st.integers(0, len(QUERY) - 1), st.integers(0, 255)).map(
        lambda x: QUERY[: x[0]] + bytes([x[1]]) + QUERY[x[0] + 1 :]
    )
    | st.integers(0, len(QUERY)).map(lambda n: QUERY[:n])
)
def test_junk_gets_a_well_formed_reply_or_none(wire: bytes) -> None:
    reply = respond(ZONE, wire, udp=True)
    if reply is not None:
        assert reply[:2] == wire[:2]
        parsed = m.parse_message(reply)
        assert parsed.flags & m.QR


@given(st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,63}", fullmatch=True), max_size=3))
def test_names_are_written_as_dnspython_writes_them(labels: list[str]) -> None:
    text = ".".join(labels)
    assert m.encode_name(text) == dns.name.from_text(text + ".").to_wire()


@pytest.mark.parametrize("text", ["a..b", ".a", "x" * 64, ".".join(["y" * 63] * 4), "é"])
def test_what_is_no_name_is_not_written(text: str) -> None:
    with pytest.raises(ValueError):
        m.encode_name(text)
