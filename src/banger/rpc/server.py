"""The daemon's socket: one request a connection, dispatched by a table of methods.

A client that closes its socket cancels its handler, except of a method that finishes what it has
begun. Every call is an operation; here it begins and ends. Errors are logged here, once, with the
operation id.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from banger.api.envelope import PROTOCOL_VERSION, Reply, Request, WireError
from banger.api.operations import REPEATABLE, Detached
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError, find_disk_full
from banger.rpc import frames
from banger.rpc.channel import Channel, accept
from banger.rpc.frames import FrameType
from banger.rpc.operations import Operations
from banger.rpc.outcomes import fill_in
from banger.rpc.unix import short_path
from banger.rpc.unsent import Unsent

if TYPE_CHECKING:
    from pathlib import Path

    from banger.rpc.operations import Entry

T = TypeVar("T")

log = logging.getLogger(__name__)

current_op: contextvars.ContextVar[str] = contextvars.ContextVar("op_id", default="")

_BACKLOG = 64
# What a command of another version needs in order to replace the daemon.
_ANY_VERSION = frozenset({"ping", "shutdown", "daemon.status"})
_FIRST_LINE_S = 10.0
# For a client that has perhaps left to hear that its call was cancelled.
_FAREWELL_S = 1.0


class Call:
    """One request while it is being answered: how its handler talks back."""

    def __init__(self, channel: Channel, operation: Entry, peer_pid: int) -> None:
        self.channel = channel
        self.operation = operation
        self.op_id = operation.id
        self.peer_pid = peer_pid
        self.streaming = False
        self.answered = False
        self._loop = asyncio.get_running_loop()
        self._unsent = Unsent()
        self._sender: asyncio.Task[None] | None = None
        self._given_up = False
        self._waits_since: float | None = None
        self._sending: set[asyncio.Task[Any]] = set()
        operation.on_cancel = self.give_up

    async def begin_stream(self) -> None:
        self.streaming = True
        await self.channel.write_document(Reply(stream=True, op_id=self.op_id))

    async def event(self, event: dict[str, Any]) -> None:
        await self.channel.write_frame(FrameType.EVENT, msgspec.json.encode(event))

    async def data(self, chunk: bytes) -> None:
        await self.channel.write_frame(FrameType.DATA, chunk)

    def data_sender(self) -> Callable[[bytes], None]:
        """What sends data from a worker thread, at the client's pace, in frames of any number."""

        def send(chunk: bytes) -> None:
            for at in range(0, len(chunk), frames.PAYLOAD_LIMIT):
                piece = bytes(chunk[at : at + frames.PAYLOAD_LIMIT])
                self._send_from_thread(self.data, piece)

        return send

    def line_sender(self) -> Callable[[str], None]:
        """What shows a line of a program's output, from a worker thread, at the client's pace."""

        def send(line: str) -> None:
            self._send_from_thread(self.event, {"output": line})

        return send

    def _send_from_thread(self, send: Callable[[T], Coroutine[Any, Any, None]], what: T) -> None:
        """Wait in a worker thread until `send` has sent something.

        Raises:
            BangerError: connection_lost; cancelled: the call is, and its client does not read.
        """

        async def sent() -> None:
            if self._given_up:
                raise asyncio.CancelledError
            task = asyncio.ensure_future(send(what))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
            self._waits_since = self._loop.time()
            try:
                await task
            finally:
                self._waits_since = None

        try:
            asyncio.run_coroutine_threadsafe(sent(), self._loop).result()
        except concurrent.futures.CancelledError as e:
            raise BangerError(
                "operation_failed", f"{self.operation.kind}: cancelled", reason="cancelled"
            ) from e

    @property
    def untaken_s(self) -> float:
        """For how long a worker thread has waited for the client to take what it sends."""
        return 0.0 if self._waits_since is None else self._loop.time() - self._waits_since

    def give_up(self) -> None:
        """Wait for the client no more: a thread that does could not hear of a cancellation."""
        self._given_up = True
        for task in self._sending:
            task.cancel()

    async def finish(self, result: Any, *, fds: tuple[int, ...] = ()) -> None:
        """Send the one answer. The descriptors stay the caller's to close."""
        await self.drain_events()
        encoded = msgspec.json.encode(result)
        if self.streaming:
            message = frames.encode(FrameType.RESULT, encoded)
        else:
            reply = Reply(result=msgspec.Raw(encoded), op_id=self.op_id, fds=len(fds))
            message = msgspec.json.encode(reply) + b"\n"
        # Not before: of one that does not fit the client hears an error instead.
        self.answered = True
        if fds:
            await self.channel.write_with_fds(message, fds)
        else:
            await self.channel.write(message)

    async def fail(self, error: BangerError) -> None:
        if self.answered:
            return
        self.answered = True
        wire = WireError.of(_filled_in(self.operation, error), self.op_id)
        if self.streaming:
            await self.channel.write_frame(FrameType.ERROR, msgspec.json.encode(wire))
        else:
            await self.channel.write_document(Reply(error=wire, op_id=self.op_id))

    # A reporter for the rooms and their worker threads: progress must never block or fail what it
    # reports on, so a task of its own sends it, in order, and merged where the client is slow.
    def _send_soon(self, event: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._start_sending, event)

    def _start_sending(self, event: dict[str, Any]) -> None:
        self.operation.tell(event)
        if not self.streaming or self.answered:
            return
        self._unsent.add(event)
        if self._sender is None or self._sender.done():
            self._sender = self._loop.create_task(self._send_events())

    async def _send_events(self) -> None:
        with contextlib.suppress(BangerError):
            while not self.answered and (events := self._unsent.take()):
                encoded = (frames.encode(FrameType.EVENT, msgspec.json.encode(e)) for e in events)
                await self.channel.write(b"".join(encoded))

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self._send_soon({"stage": stage, "label": label, "detail": detail})

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        self._send_soon({"done": done, "total": total, "detail": detail})

    def warn(self, message: str) -> None:
        self._send_soon({"warning": message})

    async def drain_events(self) -> None:
        await asyncio.sleep(0)  # lets what a thread reported last be noted
        if self._sender is not None:
            await asyncio.wait({self._sender})

    async def close(self) -> None:
        """Send nothing more: a write that still waits for room would outlive its socket."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait({self._sender})


Handler = Callable[[Call, Any], Awaitable[Any]]


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the method table. `streams`: the handler's result ends a stream of frames.
    `finishes`: once begun it is carried through, whether or not its client waits for it."""

    params: type
    handler: Handler
    streams: bool = False
    finishes: bool = False


class Server:
    """Listens on one Unix socket until closed."""

    def __init__(
        self,
        path: Path,
        methods: Mapping[str, Method],
        *,
        owner_uid: int,
        version: str,
        state: Path | None = None,
        operations: Operations | None = None,
    ) -> None:
        self.path = path
        self.operations = operations or Operations()
        self._methods = methods
        self._owner_uid = owner_uid
        self._version = version
        self._state = state
        self._tasks: set[asyncio.Task[Any]] = set()
        self._socket: socket.socket | None = None

    @property
    def active(self) -> int:
        """Requests being answered now."""
        return len(self._tasks)

    def listen(self) -> None:
        """Bind the socket (0600). The caller holds the start lock, so a leftover may be removed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        with short_path(self.path) as name:
            sock.bind(name)
        sock.listen(_BACKLOG)
        self._socket = sock

    async def serve(self) -> None:
        """Accept until cancelled."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        while True:
            connection = await accept(self._socket)
            task = loop.create_task(self._connection(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self, *, unlink: bool = True) -> None:
        if self._socket is not None:
            if unlink:
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
            self._socket.close()
        me = asyncio.current_task()
        for task in list(self._tasks):
            if task is not me:
                task.cancel()
        await asyncio.gather(*(t for t in self._tasks if t is not me), return_exceptions=True)

    async def _connection(self, sock: socket.socket) -> None:
        channel = Channel(sock)
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("3i", credentials)
            try:
                async with asyncio.timeout(_FIRST_LINE_S):
                    line = await channel.read_line()
            except TimeoutError:
                return
            except BangerError as e:
                await channel.write_document(Reply(error=WireError.of(e)))
                return
            if line is None:
                return
            await self._answer(channel, line, pid, uid)
        except BangerError as e:
            # Only the peer's going away ends here; the handler's own errors were answered.
            log.debug("connection ended: %s", e)
        finally:
            channel.close()

    async def _answer(self, channel: Channel, line: bytes, pid: int, uid: int) -> None:
        started = time.monotonic()
        try:
            request = decode_json(line, type=Request)
        except MALFORMED as e:
            error = BangerError("bad_request", f"the request line is malformed: {e}")
            await channel.write_document(Reply(error=WireError.of(error)))
            return
        try:
            method, params = self._decode(request, uid)
        except BangerError as e:
            log.info("%s refused: %s: %s", request.method, e.code, e)
            reply = Reply(error=WireError.of(e, request.op_id or None), op_id=request.op_id or None)
            await channel.write_document(reply)
            return
        entry = self.operations.begin(
            request.op_id, request.method, params, finishes=method.finishes
        )
        current_op.set(entry.id)
        call = Call(channel, entry, pid)
        try:
            if method.streams:
                await call.begin_stream()
            result = await self._carry_out(call, method, params)
            if not call.answered:
                await call.finish(result)
        except BangerError as e:
            log.info("%s failed: %s: %s", request.method, e.code, e)
            if request.method in REPEATABLE:
                e.outcome = "failed"
            if entry.task is None and entry.state == "running":
                self._settle(entry, e)
            await call.drain_events()
            await call.fail(find_disk_full(e) or e)
        except asyncio.CancelledError:
            # By the client's leaving, by `operations cancel`, or by the daemon's end.
            log.info("%s cancelled", request.method)
            with contextlib.suppress(BangerError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    # What could not be given back is in its own error. Of what was done all the
                    # same nothing is told, so that its client takes it for what may have happened.
                    if entry.state != "done":
                        known = entry.error.exception() if entry.error else _cancelled(entry)
                        await call.fail(known)
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
        except Exception as e:
            error = _unexpected(entry, e)
            if error.reason == "disk_full":
                log.warning("%s", error)
            else:
                log.exception("%s failed unexpectedly", request.method)
            await call.drain_events()
            await call.fail(error)
        finally:
            log.debug("%s %.1f ms", request.method, (time.monotonic() - started) * 1000)
            if entry.state == "running" and entry.task is None:
                # Its client left before the handler began.
                self._settle(entry, _cancelled(entry))
            await call.close()

    def _decode(self, request: Request, uid: int) -> tuple[Method, Any]:
        if uid not in (self._owner_uid, 0):
            raise BangerError("unauthorized", f"uid {uid} is not the owner of this daemon")
        if request.version != PROTOCOL_VERSION:
            raise BangerError(
                "bad_version",
                f"the daemon speaks protocol {PROTOCOL_VERSION}, not {request.version}",
                hint="banger daemon stop",
            )
        if (
            request.program is not None
            and request.program != self._version
            and request.method not in _ANY_VERSION
        ):
            raise BangerError(
                "bad_version",
                f"the daemon is version {self._version}, the command {request.program}",
                hint="banger daemon stop",
            )
        if request.state is not None and request.state != str(self._state):
            raise BangerError(
                "bad_request",
                f"the daemon at {self.path} serves the state directory {self._state}, "
                f"this command means {request.state}",
                hint="set XDG_RUNTIME_DIR to a directory of its own",
            )
        method = self._methods.get(request.method)
        if method is None:
            raise BangerError("unknown_method", f"there is no method {request.method!r}")
        try:
            return method, decode_json(request.params, type=method.params)
        except MALFORMED as e:
            raise BangerError("bad_request", f"{request.method}: {e}") from e

    async def _carry_out(self, call: Call, method: Method, params: Any) -> Any:
        """The handler's result; its client's leaving cancels it, unless it finishes alone."""
        entry = call.operation
        handler = asyncio.ensure_future(method.handler(call, params))
        if not entry.detached:
            self._follow(entry, handler)
        gone = asyncio.ensure_future(call.channel.closed())
        try:
            await asyncio.wait({handler, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not method.finishes:
                raise
        finally:
            gone.cancel()
            if not handler.done() and not method.finishes:
                call.give_up()
                handler.cancel()
            # Its rollback is waited for, whoever asked for the end.
            await asyncio.gather(gone, handler, return_exceptions=True)
        return handler.result()

    def detach(self, call: Call, work: Coroutine[Any, Any, Any]) -> Detached:
        """Let `work` go on as this call's operation, and answer the call with its id.

        It ends with the daemon, rolled back as a cancelled call is.
        """
        entry = call.operation
        assert entry.detached
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._follow(entry, task)
        return Detached(op_id=entry.id)

    def _follow(self, entry: Entry, task: asyncio.Future[Any]) -> None:
        entry.task = task
        task.add_done_callback(lambda done: self._ended(entry, done))

    def _ended(self, entry: Entry, task: asyncio.Future[Any]) -> None:
        if task.cancelled():
            self._settle(entry, _cancelled(entry))
        elif (e := task.exception()) is None:
            result = msgspec.to_builtins(task.result()) if entry.detached else None
            self.operations.end(entry, "done", result=result)
        elif isinstance(e, BangerError):
            self._settle(entry, e)
        else:
            if entry.detached:
                log.error("%s failed unexpectedly", entry.kind, exc_info=e)
            self._settle(entry, _unexpected(entry, e))

    def _settle(self, entry: Entry, error: BangerError) -> None:
        error = _filled_in(entry, find_disk_full(error) or error)
        self.operations.end(entry, error.outcome, error=WireError.of(error, entry.id))


def _filled_in(entry: Entry, error: BangerError) -> BangerError:
    vm = entry.target.partition("/")[0] if entry.kind.startswith("vm.") else ""
    return fill_in(error, vm)


def _cancelled(entry: Entry) -> BangerError:
    about = f" {entry.target}" if entry.target else ""
    given_back = "" if entry.kind in REPEATABLE else "; what it had made was given back"
    return BangerError(
        "operation_failed", f"{entry.kind}{about}: cancelled{given_back}", reason="cancelled"
    )


def _unexpected(entry: Entry, e: BaseException) -> BangerError:
    return find_disk_full(e, doing=entry.kind) or BangerError(
        "operation_failed",
        f"{entry.kind}: unexpected {type(e).__name__}: {e}",
        hint="banger daemon status",
        outcome="unknown",
    )
