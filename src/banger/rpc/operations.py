"""The table of operations: what the daemon carries out now, and for ten minutes what it did.

It lives in memory and in a journal beside the socket, one line per beginning and end. So the
daemon that comes after a crash knows what its predecessor had begun, and says of each that nobody
knows whether it happened. A lost journal costs that knowledge, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from banger.api.base import Wire
from banger.api.envelope import WireError
from banger.api.operations import REPEATABLE, Operation, OperationState
from banger.decoding import MALFORMED, decode_json
from banger.files import write_atomic
from banger.rpc.outcomes import daemon_ended, target_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

log = logging.getLogger(__name__)

KEPT_S = 600.0
_MOST_KEPT = 1000
_MOST_LINES = 4 * _MOST_KEPT
_MOST_WARNINGS = 50
# A damaged line could say a time that no calendar has.
_YEAR_10000 = 253402300800


class _Line(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the journal: a beginning, or with `state` an end."""

    id: str
    at: Annotated[float, msgspec.Meta(ge=0, lt=_YEAR_10000)]
    kind: str = ""
    target: str = ""
    detached: bool = False
    state: OperationState | None = None
    result: Any | None = None
    error: WireError | None = None


class Entry:
    """One operation while the daemon knows it. `task` carries it out, until it has ended."""

    def __init__(
        self, op_id: str, kind: str, target: str, *, started: float, finishes: bool = False
    ) -> None:
        self.id = op_id
        self.kind = kind
        self.target = target
        self.started = started
        self.finishes = finishes
        self.detached = False
        self.task: asyncio.Future[Any] | None = None
        self.on_cancel: Callable[[], None] | None = None
        self.state: OperationState = "running"
        self.ended: float | None = None
        self.result: Any | None = None
        self.error: WireError | None = None
        self._stage: dict[str, Any] = {}
        self._advance: dict[str, Any] | None = None
        self._warnings: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def tell(self, event: dict[str, Any]) -> None:
        """Take note of progress; from the loop's own thread."""
        if "stage" in event:
            self._stage, self._advance = event, None
        elif "warning" in event:
            self._warnings = [*self._warnings, event][-_MOST_WARNINGS:]
        else:
            self._advance = event
        self._wake()

    def end(
        self,
        state: OperationState,
        *,
        at: float,
        result: Any | None = None,
        error: WireError | None = None,
    ) -> None:
        self.state, self.ended, self.result, self.error = state, at, result, error
        # With all that it reached, it would be kept as long as the operation is.
        self.task = self.on_cancel = None
        self._wake()

    def cancel(self) -> None:
        """Cancel what carries it out; nothing when it has ended."""
        if self.on_cancel is not None:
            self.on_cancel()
        if self.task is not None:
            self.task.cancel()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Progress until the end. Who reads slowly misses steps, and holds nobody up."""
        stage: dict[str, Any] = {}
        advance: dict[str, Any] | None = None
        warned: dict[str, Any] | None = None
        while True:
            changed = self._changed
            for warning in self._after(warned):
                warned = warning
                yield warning
            if self._stage is not stage and self._stage:
                stage = self._stage
                yield stage
            if self._advance is not None and self._advance is not advance:
                advance = self._advance
                yield advance
            if self.state != "running":
                return
            await changed.wait()

    def _after(self, warned: dict[str, Any] | None) -> list[dict[str, Any]]:
        for number, warning in enumerate(self._warnings):
            if warning is warned:
                return self._warnings[number + 1 :]
        return list(self._warnings)

    def record(self) -> Operation:
        return Operation(
            id=self.id,
            kind=self.kind,
            target=self.target,
            state=self.state,
            stage=self._stage.get("stage", ""),
            label=self._stage.get("label", ""),
            started_at=_time_text(self.started),
            ended_at=None if self.ended is None else _time_text(self.ended),
            cancellable=self.state == "running" and not self.finishes,
            detached=self.detached,
            result=self.result,
            error=self.error,
        )


class Operations:
    """The table. `journal` None keeps it in memory only."""

    def __init__(self, journal: Path | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        self._journal = journal
        self._fd = -1
        self._lines = 0
        self._behind = False
        """A line found no room: the journal lacks what the table has."""

        if journal is not None:
            self._read(journal)
            self._rewrite()

    def begin(
        self, wanted_id: str, kind: str, params: Any = None, *, finishes: bool = False
    ) -> Entry:
        """A new operation, under the id that its client chose where that is one and is free."""
        op_id = wanted_id
        while not re.fullmatch(r"op-[0-9a-f]{6}", op_id) or op_id in self._entries:
            op_id = f"op-{secrets.token_hex(3)}"
        self._forget_old()
        entry = Entry(op_id, kind, target_of(params), started=time.time(), finishes=finishes)
        entry.detached = getattr(params, "detach", False)
        self._entries[op_id] = entry
        if kind not in REPEATABLE:
            self._write(_begin_line(entry))
        return entry

    def end(
        self,
        entry: Entry,
        state: OperationState,
        *,
        result: Any | None = None,
        error: WireError | None = None,
    ) -> None:
        """What became of it; what changed nothing is forgotten at once."""
        entry.end(state, at=time.time(), result=result, error=error)
        if entry.kind in REPEATABLE:
            del self._entries[entry.id]
        else:
            self._write(_end_line(entry))

    def find(self, op_id: str) -> Entry | None:
        self._forget_old()
        return self._entries.get(op_id)

    def list(self) -> list[Operation]:
        """Oldest first; of what has ended, the last ten minutes."""
        self._forget_old()
        return [entry.record() for entry in self._entries.values()]

    @property
    def running(self) -> int:
        return sum(entry.state == "running" for entry in self._entries.values())

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget_old(self) -> None:
        ended = [e for e in self._entries.values() if e.ended is not None]
        oldest = time.time() - KEPT_S
        surplus = len(ended) - _MOST_KEPT
        for number, entry in enumerate(ended):
            if number < surplus or (entry.ended or 0) < oldest:
                del self._entries[entry.id]

    def _read(self, journal: Path) -> None:
        """What an earlier daemon wrote. What it had not ended may have happened."""
        try:
            lines = journal.read_bytes().splitlines()
        except OSError:
            return
        for text in lines:
            # A crash in the middle of a write may have torn a line; the others are worth having.
            with contextlib.suppress(*MALFORMED):
                self._take(decode_json(text, type=_Line))
        for entry in self._entries.values():
            if entry.state == "running":
                error = WireError.of(daemon_ended(entry.kind, entry.target), entry.id)
                entry.end("unknown", at=time.time(), error=error)
        self._forget_old()

    def _take(self, line: _Line) -> None:
        if line.kind:
            entry = Entry(line.id, line.kind, line.target, started=line.at)
            entry.detached = line.detached
            self._entries[line.id] = entry
        elif line.state is not None and (known := self._entries.get(line.id)) is not None:
            known.target = line.target or known.target
            known.end(line.state, at=line.at, result=line.result, error=line.error)

    def _rewrite(self) -> bool:
        """The journal anew, with what is still known; where that fails it stays as it is."""
        assert self._journal is not None
        lines = []
        for e in self._entries.values():
            if e.kind in REPEATABLE:
                continue
            lines += [_begin_line(e)] if e.state == "running" else [_begin_line(e), _end_line(e)]
        try:
            write_atomic(self._journal, b"".join(msgspec.json.encode(x) + b"\n" for x in lines))
            fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as e:
            if not self._behind:  # once, not at every operation
                log.warning("the journal of operations %s: %s", self._journal, e)
            self._behind = True
            return False
        self.close()
        self._fd, self._lines, self._behind = fd, len(lines), False
        return True

    def _write(self, line: _Line) -> None:
        if self._journal is None:
            return
        anew = self._behind or self._fd < 0 or self._lines >= _MOST_LINES
        if anew and self._rewrite():
            return  # the table has what the line says
        self._append(msgspec.json.encode(line) + b"\n")

    def _append(self, text: bytes) -> None:
        """Add a line, or nothing of it: to a part of one the next would be glued."""
        if self._fd < 0:
            return
        size = os.fstat(self._fd).st_size
        # Not synced: it has to outlive the daemon, and not the host, which ends every VM anyway.
        with contextlib.suppress(OSError):
            if os.write(self._fd, text) == len(text):
                self._lines += 1
                return
        self._behind = True
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            self.close()


def _begin_line(entry: Entry) -> _Line:
    return _Line(
        id=entry.id,
        at=entry.started,
        kind=entry.kind,
        target=entry.target,
        detached=entry.detached,
    )


def _end_line(entry: Entry) -> _Line:
    assert entry.ended is not None
    return _Line(
        id=entry.id,
        at=entry.ended,
        target=entry.target,
        state=entry.state,
        result=entry.result,
        error=entry.error,
    )


def _time_text(at: float) -> str:
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
