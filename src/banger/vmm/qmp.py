"""QEMU's monitor (QMP) on a Unix socket: greet, ask one thing, hang up.

QEMU serves one monitor connection at a time, so none is kept.

Source: QEMU, docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.vmm.driver import connected

if TYPE_CHECKING:
    from pathlib import Path

# Events may come before an answer, at most a handful; a peer that sends nothing else is broken.
_MAX_EVENTS = 1000


class _Error(msgspec.Struct):
    desc: str = "no reason given"


class _Message(msgspec.Struct):
    error: _Error | None = None
    event: str | None = None
    qmp: dict[str, Any] | None = msgspec.field(name="QMP", default=None)
    result: dict[str, Any] | None = msgspec.field(name="return", default=None)


async def execute(socket: Path, command: str) -> dict[str, Any]:
    """Run one command without arguments and return its result.

    Raises:
        BangerError: QEMU refused, or the answer is no QMP.
        ConnectionError, EOFError: the connection broke; the command may have been carried out.
    """
    async with connected(socket) as (reader, writer):
        if (await _read(reader, command)).qmp is None:
            raise BangerError("operation_failed", f"QMP {command}: no greeting came")
        await _ask(reader, writer, "qmp_capabilities")
        return await _ask(reader, writer, command)


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str
) -> dict[str, Any]:
    writer.write(msgspec.json.encode({"execute": command}) + b"\n")
    await writer.drain()
    for _ in range(_MAX_EVENTS):
        message = await _read(reader, command)
        if message.error is not None:
            raise BangerError(
                "operation_failed",
                f"QMP {command}: QEMU answered: {message.error.desc}",
                reason="vmm_refused",
            )
        if message.result is not None:
            return message.result
    raise BangerError("operation_failed", f"QMP {command}: events only, and no answer")


async def _read(reader: asyncio.StreamReader, command: str) -> _Message:
    try:
        line = await reader.readuntil(b"\n")
        return decode_json(line, type=_Message)
    except (asyncio.LimitOverrunError, *MALFORMED) as e:
        raise BangerError("operation_failed", f"QMP {command}: {e}") from e
