"""Sessions of a guest: asked of its agent, which keeps them; nothing of them is stored here.

So a daemon that was restarted knows them all. The guest is hostile: what it says has bounds and no
control characters, because it is printed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from banger.api.base import Wire
from banger.api.results import AgentPlace
from banger.api.sessions import LogSpan, Session, SessionState, StdinMode
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api.sessions import StartSession
    from banger.guest.client import GuestClient

# A login shell's profile may be slow, and the preflight runs through it.
_START_S = 60.0
_MARGIN_S = 15.0
_MOST = 256
_HOME, _USUAL = "/root", "/root/repo"

_Word = Annotated[str, msgspec.Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
_Argument = Annotated[str, msgspec.Meta(max_length=1 << 17)]


class _Record(Wire, frozen=True, kw_only=True):
    """A session as the agent describes it."""

    id: _Word
    name: _Word
    argv: tuple[_Argument, ...]
    cwd: Annotated[str, msgspec.Meta(max_length=4096)]
    user: _Word
    stdin_mode: StdinMode
    tty: bool
    tags: tuple[_Word, ...]
    state: SessionState
    pid: int
    code: int | None
    signal: _Word
    reason: Annotated[str, msgspec.Meta(max_length=4096)]
    created_unix_ns: int
    started_unix_ns: int
    ended_unix_ns: int
    attached: bool
    logs: dict[str, LogSpan] | None = None


class _Kind(Wire, frozen=True, kw_only=True):
    kind: _Word


class _Missing(Wire, frozen=True, kw_only=True):
    missing: tuple[str, ...]


class _Records(Wire, frozen=True, kw_only=True):
    sessions: tuple[_Record, ...]


async def start(client: GuestClient, vm: str, params: StartSession) -> Session:
    """Start a session; it runs when this returns.

    Raises:
        BangerError: as the agent says: bad_request, already_exists, not_found (every program that
            is missing), operation_failed.
    """
    asked: dict[str, Any] = {
        "name": params.name,
        "argv": params.argv,
        "env": params.env,
        "login": True,
        "stdin_mode": params.stdin_mode,
        "require": params.require,
        "tags": params.tags,
    }
    if params.cwd is not None:
        asked["cwd"] = params.cwd
    if params.user is not None:
        asked["user"] = params.user
    if params.tty is not None:
        asked["tty"] = {"rows": params.tty.rows, "cols": params.tty.cols}
    return _shown(vm, await client.call("session.start", asked, _Record, timeout_s=_START_S))


async def find_place(
    client: GuestClient,
    vm: str,
    names: tuple[str, ...],
    *,
    cwd: str | None,
    workspace: str | None,
    user: str | None,
) -> AgentPlace:
    """Where a command will run that speaks over its standard streams, and that it can.

    Raises:
        BangerError: not_found: programs or the directory are missing in the guest.
    """
    if cwd is None:
        cwd = workspace
    if cwd is None:
        try:
            found = await client.call("stat", {"path": _USUAL}, _Kind)
            cwd = _USUAL if found.kind == "directory" else _HOME
        except BangerError as e:
            if e.code != "not_found":
                raise
            cwd = _HOME
    asked: dict[str, Any] = {"names": [*names, "sh"], "cwd": cwd, "login": True}
    if user is not None:
        asked["user"] = user
    missing = (await client.call("missing", asked, _Missing, timeout_s=_START_S)).missing
    lacking = [name for name in names if name in missing]
    if lacking:
        raise BangerError(
            "not_found",
            f"VM {vm} has no {', '.join(lacking)}",
            hint=f"banger vm exec {vm} -- which {lacking[0]}",
        )
    return AgentPlace(cwd=cwd, has_shell="sh" not in missing)


async def list_sessions(client: GuestClient, vm: str) -> list[Session]:
    """Every session that the guest keeps, oldest first."""
    records = (await client.call("session.list", {}, _Records)).sessions
    return [_shown(vm, record) for record in records[:_MOST]]


async def show(client: GuestClient, vm: str, name: str) -> Session:
    """One session, with the sizes of its logs. Raises BangerError: not_found."""
    return _shown(vm, await client.call("session.show", {"name": name}, _Record))


async def stop(client: GuestClient, vm: str, name: str, *, timeout_s: float) -> Session:
    """TERM to its process group, KILL after `timeout_s`; the session has ended then."""
    return _shown(
        vm,
        await client.call(
            "session.stop",
            {"name": name, "grace_s": timeout_s},
            _Record,
            timeout_s=timeout_s + _MARGIN_S,
        ),
    )


async def kill(client: GuestClient, vm: str, name: str, *, signal: str) -> Session:
    """Send a signal to its process group; after KILL it has ended."""
    asked = {"name": name, "signal": signal.upper().removeprefix("SIG")}
    return _shown(vm, await client.call("session.kill", asked, _Record))


async def remove(client: GuestClient, name: str) -> None:
    """Forget a session that has ended, with its logs."""
    await client.call("session.remove", {"name": name}, dict[str, Any])


def _shown(vm: str, record: _Record) -> Session:
    return Session(
        vm=vm,
        id=record.id,
        name=record.name,
        argv=record.argv,
        cwd=record.cwd,
        user=record.user,
        stdin_mode=record.stdin_mode,
        tty=record.tty,
        tags=record.tags,
        state=record.state,
        pid=record.pid,
        code=record.code,
        signal=record.signal or None,
        reason=record.reason or None,
        created_at=_time(record.created_unix_ns) or "",
        started_at=_time(record.started_unix_ns),
        ended_at=_time(record.ended_unix_ns),
        attached=record.attached,
        logs=record.logs,
    )


def _time(unix_ns: int) -> str | None:
    # A guest may say anything: what is no time of this era is none.
    if not 0 < unix_ns < 1 << 62:
        return None
    when = datetime.fromtimestamp(unix_ns // 1_000_000 / 1000, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
