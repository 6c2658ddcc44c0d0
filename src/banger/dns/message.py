"""DNS messages as bytes: parsed strictly, written plainly. Pure; nothing here knows a zone.

Names stay in wire form (length-prefixed labels, the root's zero at the end): comparing them without
case is one `lower()`, which leaves lengths alone, since they are below 64 and letters above.

Source: RFC 1035 §4 (format, compression), RFC 6891 (EDNS), RFC 4343 (case).
"""

from __future__ import annotations

import struct

import msgspec

HEADER_BYTES = 12
NAME_BYTES = 255
LABEL_BYTES = 63

A, NS, SOA, PTR, AAAA, OPT, ANY = 1, 2, 6, 12, 28, 41, 255
IN = 1

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

# Bits of the header's second word.
QR, AA, TC, RD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0010
OPCODE = 0x7800

_HEADER = struct.Struct("!6H")
_FIXED = struct.Struct("!HHIH")
_POINTER = 0xC0


class FormatError(ValueError):
    """Bytes that are no DNS message."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    name: bytes
    rtype: int
    rclass: int = IN


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One resource record. `rdata` is as it was sent, names in it not decompressed."""

    name: bytes
    rtype: int
    rclass: int = IN
    ttl: int = 0
    rdata: bytes = b""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """`flags` is the header's second word: QR, opcode, AA, TC, RD, RA, AD, CD, rcode."""

    id: int
    flags: int = 0
    questions: tuple[Question, ...] = ()
    answers: tuple[Record, ...] = ()
    authority: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()

    @property
    def rcode(self) -> int:
        """The response code, with the upper bits that EDNS adds to it."""
        opt = find_opt(self)
        return (self.flags & 0xF) | ((opt.ttl >> 24) << 4 if opt is not None else 0)


def parse_message(wire: bytes) -> Message:
    """A whole message.

    Raises:
        FormatError: it is cut off or goes on after its end, a name climbs or is too long, or it
            has more than one OPT record (RFC 6891 §6.1.1) or one that is not the root's.
    """
    if len(wire) < HEADER_BYTES:
        raise FormatError("shorter than a header")
    ident, flags, *counts = _HEADER.unpack_from(wire)
    offset = HEADER_BYTES
    questions: list[Question] = []
    for _ in range(counts[0]):
        name, offset = parse_name(wire, offset)
        rtype, rclass = struct.unpack("!HH", _take(wire, offset, 4))
        offset += 4
        questions.append(Question(name=name, rtype=rtype, rclass=rclass))
    sections: list[tuple[Record, ...]] = []
    for count in counts[1:]:
        records: list[Record] = []
        for _ in range(count):
            record, offset = _parse_record(wire, offset)
            records.append(record)
        sections.append(tuple(records))
    if offset != len(wire):
        raise FormatError("bytes after the last record")
    message = Message(
        id=ident,
        flags=flags,
        questions=tuple(questions),
        answers=sections[0],
        authority=sections[1],
        additional=sections[2],
    )
    find_opt(message)
    return message


def _parse_record(wire: bytes, offset: int) -> tuple[Record, int]:
    name, offset = parse_name(wire, offset)
    rtype, rclass, ttl, size = _FIXED.unpack(_take(wire, offset, _FIXED.size))
    offset += _FIXED.size
    rdata = _take(wire, offset, size)
    return Record(name=name, rtype=rtype, rclass=rclass, ttl=ttl, rdata=rdata), offset + size


def _take(wire: bytes, offset: int, size: int) -> bytes:
    piece = wire[offset : offset + size]
    if len(piece) != size:
        raise FormatError("cut off")
    return piece


def find_opt(message: Message) -> Record | None:
    """The OPT record of a message. Raises FormatError when it has several, or a named one."""
    found = [record for record in message.additional if record.rtype == OPT]
    if len(found) > 1 or any(record.name != b"\0" for record in found):
        raise FormatError("more than one OPT record, or one with a name")
    return found[0] if found else None


def parse_name(wire: bytes, offset: int) -> tuple[bytes, int]:
    """The name at `offset`, decompressed, and the offset after it.

    Raises:
        FormatError: cut off, over 255 bytes, an unknown label type, or a pointer that does not go
            back: only so can none of them go round in circles.
    """
    labels: list[bytes] = []
    total = 1
    after: int | None = None
    lowest = offset
    while True:
        size = _take(wire, offset, 1)[0]
        if size == 0:
            labels.append(b"\0")
            return b"".join(labels), offset + 1 if after is None else after
        if size & _POINTER == _POINTER:
            target = int.from_bytes(_take(wire, offset, 2), "big") & 0x3FFF
            if target >= lowest:
                raise FormatError("a pointer that does not go back")
            after = offset + 2 if after is None else after
            lowest = offset = target
            continue
        if size & _POINTER:
            raise FormatError("a label of an unknown type")
        total += size + 1
        if total > NAME_BYTES:
            raise FormatError("a name over 255 bytes")
        labels.append(_take(wire, offset, size + 1))
        offset += size + 1


def plain_name_end(wire: bytes, offset: int) -> int:
    """The offset after a name that uses no pointer, as a question's name never does.

    Raises:
        FormatError: as `parse_name`, and where there is a pointer.
    """
    start, end = offset, len(wire)
    while offset < end:
        size = wire[offset]
        if size == 0:
            if offset + 1 - start > NAME_BYTES:
                break
            return offset + 1
        if size > LABEL_BYTES:
            break
        offset += size + 1
    raise FormatError("a malformed name")


def format_message(message: Message) -> bytes:
    """A message as bytes, without compression."""
    sections = (message.answers, message.authority, message.additional)
    return b"".join(
        [
            _HEADER.pack(
                message.id, message.flags, len(message.questions), *(len(s) for s in sections)
            ),
            *(q.name + struct.pack("!HH", q.rtype, q.rclass) for q in message.questions),
            *(format_record(record) for section in sections for record in section),
        ]
    )


def format_record(record: Record) -> bytes:
    fixed = _FIXED.pack(record.rtype, record.rclass, record.ttl, len(record.rdata))
    return record.name + fixed + record.rdata


def encode_name(text: str) -> bytes:
    """`web.vm` in wire form; a dot at the end changes nothing, "" and "." are the root.

    Raises:
        ValueError: an empty label, one over 63 bytes, a name over 255, or not ASCII.
    """
    text = text.removesuffix(".")
    wire = b""
    for label in text.encode("ascii").split(b".") if text else ():
        if not 0 < len(label) <= LABEL_BYTES:
            raise ValueError(f"{text!r} is no domain name: its labels have 1 to 63 characters")
        wire += bytes([len(label)]) + label
    if len(wire) + 1 > NAME_BYTES:
        raise ValueError(f"{text[:40]!r}… is no domain name: it has more than 255 bytes")
    return wire + b"\0"


def soa_rdata(primary: bytes, mailbox: bytes, *, serial: int, times_s: tuple[int, ...]) -> bytes:
    """`times_s`: refresh, retry, expire, and how long "there is none" may be kept (RFC 2308)."""
    return primary + mailbox + struct.pack("!5I", serial & 0xFFFFFFFF, *times_s)


def opt_record(*, payload_bytes: int, rcode: int = NOERROR, dnssec_ok: bool = False) -> Record:
    """EDNS version 0 without options (RFC 6891 §6.1.2); DO is copied (RFC 3225 §3)."""
    ttl = (rcode >> 4) << 24 | (0x8000 if dnssec_ok else 0)
    return Record(name=b"\0", rtype=OPT, rclass=payload_bytes, ttl=ttl)
