"""Calls to the daemon from the command line: synchronous, one connection a call."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from banger import __version__
from banger.api.envelope import PROTOCOL_VERSION, Reply, Request, WireError
from banger.api.operations import REPEATABLE
from banger.decoding import convert, decode_json
from banger.errors import BangerError
from banger.rpc.blocking import BlockingChannel
from banger.rpc.frames import FrameType
from banger.rpc.outcomes import lost_after, lost_before, target_of
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


def _ask(
    channel: BlockingChannel,
    method: str,
    params: msgspec.Struct | dict[str, Any],
    state: Path | None = None,
) -> Reply:
    """The first line of the answer. The id of the operation is ours, so that we can name it."""
    op_id = f"op-{os.urandom(3).hex()}"
    request = Request(
        version=PROTOCOL_VERSION,
        method=method,
        params=msgspec.Raw(msgspec.json.encode(params)),
        op_id=op_id,
        program=__version__,
        state=None if state is None else str(state),
    )
    try:
        channel.write_document(request)
        cut_off = None
    except (BrokenPipeError, ConnectionResetError) as e:
        cut_off = e
    line = channel.read_line()
    if line is None and cut_off is not None:
        raise lost_before(method) from cut_off
    if line is None:
        raise lost_after(method, target_of(params), op_id)
    reply = decode_json(line, type=Reply)
    if reply.error is not None:
        raise reply.error.exception()
    return msgspec.structs.replace(reply, op_id=reply.op_id or op_id)


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
        return convert(reply.result, type=result)
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
        return convert(reply.result, type=result), socket.socket(fileno=fd)
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
        self._target = target_of(params)
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
                self._on_event(decode_json(payload, dict[str, Any]))
            elif kind is FrameType.ERROR:
                raise decode_json(payload, type=WireError).exception()
            elif kind is FrameType.RESULT:
                self.result_payload = payload
                return
            elif kind is FrameType.DATA:
                yield payload
        raise lost_after(self._method, self._target, self.reply.op_id or "")

    def result(self, kind: type[T]) -> T:
        """Wait for the final result. Raises as `call`."""
        for _ in self.frames():
            raise BangerError("operation_failed", f"{self._method} sent data where none was due")
        return decode_json(self.result_payload, type=kind)

    def fd(self) -> socket.socket:
        """The connected descriptor that came with the final frame."""
        (fd,) = self.channel.take_fds(1)
        return socket.socket(fileno=fd)

    def close(self) -> None:
        self.channel.close()

    def cancel(self) -> str:
        """Ask the daemon to roll back, and wait until it has; at most some seconds.

        The daemon takes the end of what we send as the wish. Returns what became of it, in words;
        nothing where that goes without saying.
        """
        show = f"see: banger daemon operations show {self.reply.op_id}"
        self.channel.sock.settimeout(_ROLLBACK_S)
        try:
            self.channel.sock.shutdown(socket.SHUT_WR)
            while (frame := self.channel.read_frame()) is not None:
                if frame[0] is FrameType.RESULT:
                    return "" if self._method in REPEATABLE else f"too late, it is done; {show}"
                if frame[0] is FrameType.ERROR:
                    failed = decode_json(frame[1], type=WireError).exception()
                    # Else it was given back, which is what was wished.
                    told = [str(failed), *([f"hint: {failed.hint}"] if failed.hint else [])]
                    return "\n".join(told) if failed.outcome == "unknown" else ""
        except TimeoutError:
            return f"what it had made is still being given back; {show}"
        except (OSError, BangerError):
            pass
        error = lost_after(self._method, self._target, self.reply.op_id or "")
        return str(error) if error.outcome == "unknown" else ""

    def __enter__(self) -> StreamingCall:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if isinstance(error, KeyboardInterrupt) and (told := self.cancel()):
                error.add_note(told)
        finally:
            self.close()
