"""Sessions: long-lived commands of a guest, as they are asked for and shown (spec 9.1)."""

from __future__ import annotations

from typing import Literal

import msgspec

from banger.api.base import Params, Wire

SessionState = Literal["starting", "running", "exited", "failed", "lost"]
StdinMode = Literal["detached", "pipe"]


class TerminalSize(Params, frozen=True, kw_only=True):
    rows: int
    cols: int


class StartSession(Params, frozen=True, kw_only=True):
    """`require`: programs that must be there, beside the command's own."""

    vm: str
    name: str
    argv: tuple[str, ...]
    cwd: str | None = None
    env: dict[str, str] = msgspec.field(default_factory=dict)
    user: str | None = None
    stdin_mode: StdinMode = "detached"
    tty: TerminalSize | None = None
    require: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class SessionRef(Params, frozen=True, kw_only=True):
    vm: str
    session: str


class StopSession(Params, frozen=True, kw_only=True):
    vm: str
    session: str
    timeout_s: float = 10.0


class KillSession(Params, frozen=True, kw_only=True):
    vm: str
    session: str
    signal: str = "KILL"


class LogSpan(Wire, frozen=True, kw_only=True):
    """What is kept of a stream: its bytes from `start` to `end` of all that was written."""

    start: int
    end: int


class Session(Wire, frozen=True, kw_only=True):
    """One session. Times are RFC 3339 in UTC; values of its environment are not shown."""

    vm: str
    id: str
    name: str
    argv: tuple[str, ...]
    cwd: str
    user: str
    stdin_mode: StdinMode
    tty: bool
    tags: tuple[str, ...]
    state: SessionState
    pid: int
    code: int | None
    signal: str | None
    reason: str | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    attached: bool
    logs: dict[str, LogSpan] | None = None

    @property
    def live(self) -> bool:
        return self.state in ("starting", "running")
