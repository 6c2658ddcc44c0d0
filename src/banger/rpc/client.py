"""Calls to the daemon from the command line: synchronous, one connection a call."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from banger import __version__
from banger.api.envelope import PROTOCOL_VERSION, Reply, Request, WireError
from banger.errors import BangerError
from banger.rpc.blocking import BlockingChannel
from banger.rpc.frames import FrameType
from banger.rpc.unix import short_path

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")
OnEvent = Callable[[dict[str, Any]], None]

# A VMM that hangs in the kernel is waited for longer, but not by a person at a prompt.
_ROLLBACK_S = 15.0


class DaemonAbsent(BangerError):
    """Nobody listens at the daemon's socket."""


def connect(path: Path, *, timeout_s: float | None = None) -> BlockingChannel:
    """A connection to the daemon.

    Raises:
        DaemonAbsent: no daemon listens there.
        BangerError: it may not be reached (permission, path too long).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        with short_path(path) as name:
            sock.connect(name)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as e:
        sock.close()
        raise DaemonAbsent("not_found", "the daemon is not running") from e
    except OSError as e:
        sock.close()
        raise BangerError(
            "unauthorized" if isinstance(e, PermissionError) else "operation_failed",
            f"connecting to the daemon at {path}: {e.strerror or e}",
        ) from e
    return BlockingChannel(sock)


def _lost(method: str) -> BangerError:
    return BangerError(
        "operation_failed",
        f"{method}: the daemon went away before it answered; whether it was carried out is unknown",
        hint="banger vm list",
        reason="connection_lost",
    )


def _ask(
    channel: BlockingChannel,
    method: str,
    params: msgspec.Struct | dict[str, Any],
    state: Path | None = None,
) -> Reply:
    request = Request(
        version=PROTOCOL_VERSION,
        method=method,
        params=msgspec.Raw(msgspec.json.encode(params)),
        program=__version__,
        state=None if state is None else str(state),
    )
    try:
        channel.write_document(request)
        line = channel.read_line()
    except (BrokenPipeError, ConnectionResetError) as e:
        raise _lost(method) from e
    if line is None:
        raise _lost(method)
    reply = msgspec.json.decode(line, type=Reply)
    if reply.error is not None:
        raise reply.error.exception()
    return reply


def call(
    path: Path,
    method: str,
    params: msgspec.Struct | dict[str, Any],
    result: type[T],
    *,
    timeout_s: float | None = None,
    state: Path | None = None,
) -> T:
    """One call with one result. `state`: the state directory whose daemon is meant.

    Raises:
        BangerError: the daemon's own error, or connection_lost.
    """
    channel = connect(path, timeout_s=timeout_s)
    try:
        reply = _ask(channel, method, params, state)
        return msgspec.convert(reply.result, type=result)
    finally:
        channel.close()


def call_with_fd(
    path: Path,
    method: str,
    params: msgspec.Struct | dict[str, Any],
    result: type[T],
    *,
    state: Path | None = None,
) -> tuple[T, socket.socket]:
    """One call whose result comes with a connected descriptor. Raises as `call`."""
    channel = connect(path)
    try:
        reply = _ask(channel, method, params, state)
        (fd,) = channel.take_fds(1)
        return msgspec.convert(reply.result, type=result), socket.socket(fileno=fd)
    finally:
        channel.close()


class StreamingCall:
    """A streaming call in progress. Closing it cancels what has not ended (or ends the guard)."""

    def __init__(
        self,
        path: Path,
        method: str,
        params: msgspec.Struct | dict[str, Any],
        on_event: OnEvent,
        *,
        state: Path | None = None,
    ) -> None:
        self._method = method
        self._on_event = on_event
        self.channel = connect(path)
        try:
            self.reply = _ask(self.channel, method, params, state)
        except BaseException:
            self.channel.close()
            raise

    def frames(self) -> Any:
        """Data frames one by one until the end; events go to the listener. Raises as `call`."""
        while (frame := self.channel.read_frame()) is not None:
            kind, payload = frame
            if kind is FrameType.EVENT:
                self._on_event(msgspec.json.decode(payload))
            elif kind is FrameType.ERROR:
                raise msgspec.json.decode(payload, type=WireError).exception()
            elif kind is FrameType.RESULT:
                self.result_payload = payload
                return
            elif kind is FrameType.DATA:
                yield payload
        raise _lost(self._method)

    def result(self, kind: type[T]) -> T:
        """Wait for the final result. Raises as `call`."""
        for _ in self.frames():
            raise BangerError("operation_failed", f"{self._method} sent data where none was due")
        return msgspec.json.decode(self.result_payload, type=kind)

    def fd(self) -> socket.socket:
        """The connected descriptor that came with the final frame."""
        (fd,) = self.channel.take_fds(1)
        return socket.socket(fileno=fd)

    def close(self) -> None:
        self.channel.close()

    def cancel(self) -> None:
        """Ask the daemon to roll back, and wait until it has; at most some seconds.

        The daemon takes the end of what we send as the wish, and closes when it is done.
        """
        self.channel.sock.settimeout(_ROLLBACK_S)
        with contextlib.suppress(OSError):
            self.channel.sock.shutdown(socket.SHUT_WR)
            while self.channel.sock.recv(1 << 16):
                pass

    def __enter__(self) -> StreamingCall:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self.cancel()
        finally:
            self.close()
