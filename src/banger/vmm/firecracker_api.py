"""Firecracker's HTTP API over its Unix socket: one small request, one small answer, no more.

A connection lives for one request. Answers are read to their stated length and no further.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.vmm.driver import connected

if TYPE_CHECKING:
    from pathlib import Path

# Firecracker's longest answer is the full configuration, some kilobytes.
_MAX_BODY = 1 << 20


class _Fault(msgspec.Struct):
    fault_message: str


class Refused(BangerError):
    """Firecracker answered a request with an error; `fault` is its own text."""

    def __init__(self, doing: str, status: int, fault: str) -> None:
        self.status = status
        self.fault = fault
        super().__init__(
            "operation_failed",
            f"{doing}: Firecracker answered {status}: {fault}",
            reason="vmm_refused",
        )


async def send(socket: Path, method: str, path: str, document: object) -> None:
    """Send one document and wait for the answer that it was taken (status 200 or 204).

    Raises:
        Refused: Firecracker said no; its message is in the error.
        BangerError: the answer is not HTTP as Firecracker speaks it.
        ConnectionError, EOFError: the connection broke; the request may have been carried out.
    """
    doing = f"{method} {path}"
    body = msgspec.json.encode(document)
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with connected(socket) as (reader, writer):
        writer.write(head.encode("ascii") + body)
        await writer.drain()
        try:
            status, length = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        except (asyncio.LimitOverrunError, ValueError) as e:
            raise BangerError(
                "operation_failed", f"{doing}: the answer is not Firecracker's: {e}"
            ) from e
        answer = await reader.readexactly(length)
    if status not in (200, 204):
        raise Refused(doing, status, _fault_text(answer))


def _parse_head(head: bytes) -> tuple[int, int]:
    """Status and body length of a response head (RFC 9112 §4, §6.2)."""
    first, *fields = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not (rest[:3].isascii() and rest[:3].isdigit()):
        raise ValueError(f"status line {first[:80]!r}")
    length = 0
    for field in fields:
        name, _, value = field.partition(":")
        if name.lower() == "content-length":
            length = int(value)
        elif name.lower() == "transfer-encoding":
            raise ValueError(f"transfer encoding {value.strip()[:80]!r}")
    if not 0 <= length <= _MAX_BODY:
        raise ValueError(f"a body of {length} bytes")
    return int(rest[:3]), length


def _fault_text(answer: bytes) -> str:
    try:
        return decode_json(answer, type=_Fault).fault_message
    except MALFORMED:
        return answer[:400].decode(errors="replace").strip() or "no reason given"
