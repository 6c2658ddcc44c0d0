"""One query in, one reply out: what an authoritative server says. Pure, and the server's hot path.

Only a question is read, and the OPT record where there is one; the question goes back as it came,
so that the case in which a name was asked for is kept.

Source: RFC 1035 §4.1, RFC 2308 §2, RFC 6891, RFC 8482.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from banger.dns import message as m

if TYPE_CHECKING:
    from banger.dns.zone import Zone

UDP_BYTES = 512
EDNS_BYTES = 1232
TCP_BYTES = 65535

_ONE_QUESTION = b"\0\1\0\0\0\0\0\0"
_WITH_OPT = b"\0\1\0\0\0\0\0\1"
_AN_NS_NONE = b"\0\0\0\0"
_AN_NONE_NS_ONE = b"\0\0\0\1"
_IN = b"\0\1"
# Not kinds of data but of transfer and of message, ANY apart (RFC 6895 §3.1).
_META = range(249, 255)
_OPT = struct.Struct("!BHHIH")
# Without and with DO, which goes back as it came.
_OUR_OPT = tuple(
    m.format_record(m.opt_record(payload_bytes=EDNS_BYTES, dnssec_ok=do)) for do in (False, True)
)


def respond(zone: Zone, query: bytes, *, udp: bool) -> bytes | None:
    """The reply to a query; None where there is none to give: a reply, or less than a header."""
    if len(query) < m.HEADER_BYTES or query[2] & 0x80:
        return None
    if query[2] & 0x78:
        return _bare(query, m.NOTIMP)
    limit = UDP_BYTES if udp else TCP_BYTES
    tail, extra = b"", b"\0\0"
    try:
        end = m.plain_name_end(query, m.HEADER_BYTES) + 4
        counts = query[4:12]
        if counts != _ONE_QUESTION or len(query) != end:
            opt = _read_opt(query, counts, end)
            if opt is not None:
                payload_bytes, flags = opt
                if udp:
                    limit = min(max(payload_bytes, UDP_BYTES), EDNS_BYTES)
                tail, extra = _OUR_OPT[flags >> 15 & 1], b"\0\1"
                if flags >> 16 & 0xFF:
                    return _bad_version(query, end)
    except m.FormatError:
        return _bare(query, m.FORMERR)

    name = query[12 : end - 4].lower()
    node = zone.find(name)
    rtype = query[end - 4] << 8 | query[end - 3]
    if node is not None and query[end - 2 : end] == _IN and rtype not in _META:
        found = node.get(rtype)
        if found is not None:
            count, body = found
            head = b"%b\0%c\0\0" % (_head(query, m.NOERROR), count)
        else:
            body = zone.authority(name) or b""
            head = _head(query, m.NOERROR) + _AN_NONE_NS_ONE
    else:
        soa = zone.authority(name)
        if soa is None or query[end - 2 : end] != _IN or rtype in _META:
            body, head = b"", _head(query, m.REFUSED, authoritative=False) + _AN_NS_NONE
        else:
            body, head = soa, _head(query, m.NXDOMAIN) + _AN_NONE_NS_ONE
    reply = head + extra + query[12:end] + body + tail
    return reply if len(reply) <= limit else _truncated(reply, query[12:end], extra, tail)


def _head(query: bytes, rcode: int, *, authoritative: bool = True) -> bytes:
    """Id, flags and the question's count. Opcode, RD and CD come from the query."""
    high = 0x80 | (query[2] & 0x79) | (0x04 if authoritative else 0)
    return b"%b%c%c\0\1" % (query[:2], high, (query[3] & 0x10) | rcode)


def _bare(query: bytes, rcode: int) -> bytes:
    """A header alone: of what was asked nothing is sure."""
    return _head(query, rcode, authoritative=False)[:4] + bytes(8)


def _truncated(reply: bytes, question: bytes, extra: bytes, tail: bytes) -> bytes:
    """TC, and nothing that could be taken for a whole answer (RFC 2181 §9)."""
    flags = bytes([reply[2] | m.TC >> 8, reply[3]])
    return reply[:2] + flags + b"\0\1" + _AN_NS_NONE + extra + question + tail


def _bad_version(query: bytes, end: int) -> bytes:
    """BADVERS, whose upper bits are in the OPT record (RFC 6891 §6.1.3)."""
    opt = m.format_record(m.opt_record(payload_bytes=EDNS_BYTES, rcode=m.BADVERS))
    head = _head(query, m.BADVERS & 0xF, authoritative=False)
    return head + _AN_NS_NONE + b"\0\1" + query[12:end] + opt


def _read_opt(query: bytes, counts: bytes, end: int) -> tuple[int, int] | None:
    """Payload size and flags of the OPT record in a query with more than a question.

    Raises:
        FormatError: what follows the question is malformed.
    """
    if counts == _WITH_OPT and len(query) >= end + _OPT.size:
        # What every stub resolver sends; the whole parser says the same, more slowly.
        name, rtype, payload_bytes, flags, size = _OPT.unpack_from(query, end)
        if name == 0 and rtype == m.OPT and size == len(query) - end - _OPT.size:
            return payload_bytes, flags
    parsed = m.parse_message(query)
    if len(parsed.questions) != 1:
        raise m.FormatError("not one question")
    record = m.find_opt(parsed)
    return (record.rclass, record.ttl) if record is not None else None
