"""The line to the root helper: a child of ours in user mode, a service in system mode.

The child has one socket pair and takes one request at a time; it is started by the first call,
again by the next one after it died, and ends when we close the socket. The service takes a
connection per call. Leases belong to neither: they stay until they are released. A call that was
begun is carried through even when the caller is cancelled: what it asked for happens all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakValueDictionary

import msgspec

from banger import process
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError, ErrorCode
from banger.host.privilege import build_helper_argv
from banger.rpc.server import current_op

if TYPE_CHECKING:
    from pathlib import Path

_LINE_LIMIT = 1 << 20
# A release waits up to 60 s for the VMM to die; beyond this the helper itself hangs.
_CALL_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0


class _Error(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str
    hint: str | None = None
    reason: str | None = None


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    # Empty where there is none: msgspec takes no Raw in a union.
    result: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None


class _Child:
    """A running helper and our end of its socket."""

    def __init__(
        self,
        program: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.program = program
        self.reader = reader
        self.writer = writer


class Calls:
    """Calls under way. A subclass says how one request becomes one answer."""

    def __init__(self) -> None:
        self._calls: set[asyncio.Task[bytes]] = set()

    async def call(self, method: str, params: dict[str, Any], *, op_id: str = "") -> bytes:
        """Carry out one request; return the JSON of its result.

        Raises:
            BangerError: as the helper says; reason connection_lost where it died before it
                answered: then what was asked may or may not have happened.
        """
        request: dict[str, Any] = {"version": 1, "method": method, "params": params}
        # The helper's log line carries the id of the request that it is part of.
        if op_id := op_id or current_op.get():
            request["op_id"] = op_id
        line = msgspec.json.encode(request) + b"\n"
        lease = str(params.get("vm_id") or params.get("id") or "")
        task = asyncio.create_task(self._exchange(method, line, lease))
        self._calls.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Let the calls under way finish."""
        while self._calls:
            await asyncio.wait(self._calls)

    async def _exchange(self, method: str, line: bytes, lease: str) -> bytes:
        raise NotImplementedError

    def _forget(self, task: asyncio.Task[bytes]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            # The caller may have been cancelled: nobody else would look at the failure.
            task.exception()


class HelperService(Calls):
    """The installed helper, behind its socket; calls go side by side, those about one lease in the
    order in which they were made.

    A call whose caller was cancelled goes on, and a release must not overtake its prepare.
    """

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self._socket = socket
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def _exchange(self, method: str, line: bytes, lease: str) -> bytes:
        if not lease:
            return await self._ask(method, line)
        turn = self._turns.setdefault(lease, asyncio.Lock())
        async with turn:
            return await self._ask(method, line)

    async def _ask(self, method: str, line: bytes) -> bytes:
        doing = f"asking the root helper to {method}"
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket, limit=_LINE_LIMIT)
        except OSError as e:
            raise BangerError(
                "operation_failed",
                f"{doing}: connecting to {self._socket}: {e.strerror}",
                hint="sudo systemctl restart bangerd-root",
            ) from e
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                writer.write(line)
                await writer.drain()
                return _decode(method, await reader.readuntil(b"\n"))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
            raise _lost(method, e, "ended") from e
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Helper(Calls):
    """The helper as our child; use it from one event loop."""

    def __init__(
        self,
        *,
        helper: Path,
        kind: Literal["root", "sudo"],
        owner_uid: int,
        ledger: Path,
        log: Path | None,
    ) -> None:
        super().__init__()
        self._arguments = ("--owner-uid", str(owner_uid), "--ledger", str(ledger), "--fd", "0")
        self._argv = build_helper_argv(helper, self._arguments, kind=kind)
        self._ledger = ledger
        self._log = log
        self._lock = asyncio.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return self._child.program.pid if self._child else None

    async def aclose(self) -> None:
        """Let the calls under way finish, then end the child."""
        await super().aclose()
        async with self._lock:
            await self._drop()

    async def _exchange(self, method: str, line: bytes, lease: str) -> bytes:
        async with self._lock:
            child = self._child
            if child is not None and (child.reader.at_eof() or child.program.poll() is not None):
                await self._drop()
                child = None
            if child is None:
                child = self._child = await self._start()
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    child.writer.write(line)
                    await child.writer.drain()
                    answer = await child.reader.readuntil(b"\n")
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
                status = await self._drop()
                raise _lost(method, e, f"ended (status {status})") from e
            return _decode(method, answer)

    async def _start(self) -> _Child:
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            output: int | None = None
            if self._log is not None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                output = os.open(self._log, flags, 0o600)
                stack.callback(os.close, output)
            # The socket is the child's stdin: sudo closes every descriptor above 2.
            program = process.popen(self._argv, stdin=theirs.fileno(), stdout=output, stderr=output)
            # From here on the stream owns the socket, and the child its copy of the log.
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
            if output is not None:
                os.close(output)
            stack.pop_all()
        return _Child(program, reader, writer)

    async def _drop(self) -> int | None:
        """Close the socket and wait for the child's end; kill it when that takes too long."""
        child, self._child = self._child, None
        if child is None:
            return None
        child.writer.close()
        with contextlib.suppress(OSError):
            await child.writer.wait_closed()
        program = child.program
        try:
            return await asyncio.to_thread(program.wait, _END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Under sudo this is sudo's own process, which passes on what it can. The helper reads
            # the end of its input as soon as it is done, and its ledger says how far it got.
            with contextlib.suppress(PermissionError):
                program.kill()
                return await asyncio.to_thread(program.wait)
            return None


def _lost(method: str, error: Exception, ended: str) -> BangerError:
    # TimeoutError is an OSError: a helper that hangs is treated as one that died.
    how = (
        f"gave no answer within {_CALL_TIMEOUT_S:g} s"
        if isinstance(error, TimeoutError)
        else f"{ended} before it answered"
    )
    return BangerError(
        "operation_failed",
        f"asking the root helper to {method}: it {how}; it may or may not have been done",
        hint="banger doctor",
        reason="connection_lost",
        outcome="unknown",
    )


def _decode(method: str, line: bytes) -> bytes:
    doing = f"asking the root helper to {method}"
    try:
        answer = decode_json(line, type=_Answer)
    except MALFORMED as e:
        raise BangerError("operation_failed", f"{doing}: its answer is unreadable: {e}") from e
    if answer.error is not None:
        code: ErrorCode = "operation_failed"
        for known in get_args(ErrorCode):
            if answer.error.code == known:
                code = known
        raise BangerError(
            code, answer.error.message, hint=answer.error.hint, reason=answer.error.reason
        )
    if not bytes(answer.result):
        raise BangerError("operation_failed", f"{doing}: its answer has no result")
    return bytes(answer.result)
