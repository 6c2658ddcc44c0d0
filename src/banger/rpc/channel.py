"""One connection on the event loop: lines, frames and descriptors over a raw socket.

asyncio's streams read with plain `recv` and lose descriptors that arrive beside the bytes, so this
module reads and writes the socket itself. A channel owns its socket from construction to `close`
or `detach`. Writers may be several tasks; there is one reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from typing import TYPE_CHECKING

import msgspec

from banger.api.envelope import Reply
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.rpc import frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from banger.rpc.frames import FrameType

log = logging.getLogger(__name__)

_RECV = 256 << 10
# accept(2): out of descriptors or memory, or the peer has left already.
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
_NO_ROOM_S = 0.1


def connection_lost(doing: str) -> BangerError:
    """The error of a peer that went away before it had answered: nobody knows what it did."""
    return BangerError(
        "operation_failed",
        f"{doing}: the connection was lost; whether it was carried out is not known",
        reason="connection_lost",
        outcome="unknown",
    )


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._write = asyncio.Lock()
        self._cut = False
        """A write was cancelled, perhaps in the middle: what came after it would be misread."""

    async def _fill(self) -> bool:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, _RECV)
        except OSError:
            # Reset, or a guest that vanished: ETIMEDOUT and EHOSTUNREACH come too, tcp(7).
            return False
        self._buffer += data
        return bool(data)

    async def read_line(self) -> bytes | None:
        """The next line without its newline; None when the peer closed before a whole line.

        Raises:
            BangerError: bad_request, a line over 1 MiB.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            if len(self._buffer) > frames.LINE_LIMIT:
                raise BangerError("bad_request", "a protocol line is longer than 1 MiB")
            searched = len(self._buffer)
            if not await self._fill():
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def read_frame(self) -> tuple[FrameType, bytes] | None:
        """The next frame; None when the peer closed. Raises as `frames.decode_header`."""
        header = await self._exactly(frames.HEADER_BYTES)
        if header is None:
            return None
        kind, length = frames.decode_header(header)
        payload = await self._exactly(length)
        return None if payload is None else (kind, payload)

    async def _exactly(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            if not await self._fill():
                return None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def closed(self) -> None:
        """Return when the peer has closed; what it still sends is read and dropped."""
        while await self._fill():
            self._buffer.clear()

    async def write(self, data: bytes) -> None:
        """Send bytes in one piece between other writers.

        Raises:
            BangerError: operation_failed, reason connection_lost.
        """
        async with self._write:
            await self._send(data)

    async def _send(self, data: bytes) -> None:
        if self._cut:
            raise connection_lost("sending to the peer")
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError as e:
            raise connection_lost("sending to the peer") from e
        except asyncio.CancelledError:
            self._cut = True
            raise

    async def write_document(self, document: msgspec.Struct | dict[str, object]) -> None:
        await self.write(msgspec.json.encode(document) + b"\n")

    async def write_frame(self, kind: FrameType, payload: bytes = b"") -> None:
        await self.write(frames.encode(kind, payload))

    async def write_with_fds(self, data: bytes, fds: Sequence[int]) -> None:
        """Send bytes; the first carries descriptors (SCM_RIGHTS, unix(7)). Raises as `write`."""
        async with self._write:
            sent = 0
            while not sent:
                if self._cut:
                    raise connection_lost("sending to the peer")
                try:
                    sent = socket.send_fds(self._sock, [data], list(fds))
                except BlockingIOError:
                    await _writable(self._sock)
                except OSError as e:
                    raise connection_lost("sending to the peer") from e
            if sent < len(data):
                await self._send(data[sent:])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def detach(self) -> socket.socket:
        """Give the socket away; only between messages, when nothing is buffered."""
        if self._buffer:
            raise BangerError("operation_failed", "the peer sent more than was asked for")
        return self._sock


async def accept(sock: socket.socket) -> socket.socket:
    """The next connection of a non-blocking listener, however long it takes to have room for it.

    A process out of descriptors must not go deaf for the rest of its life.
    """
    while True:
        try:
            connection, _ = sock.accept()
        except BlockingIOError:
            # Not sock_accept: cancelled at the wrong moment it forgets a connection it has taken.
            await _readable(sock)
        except OSError as e:
            if e.errno not in _NO_ROOM:
                raise
            log.warning("accepting a connection: %s", e.strerror)
            # The kernel does not say when a descriptor becomes free, and the listener stays ready.
            await asyncio.sleep(_NO_ROOM_S)
        else:
            connection.setblocking(False)
            return connection


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, _set, ready)
    try:
        await ready
    finally:
        # Closed meanwhile, its number may be another socket's.
        if sock.fileno() >= 0:
            loop.remove_reader(sock)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(sock)


def decode_reply(line: bytes | None, doing: str) -> Reply:
    """The reply of a line, its error raised.

    Raises:
        BangerError: the peer's own error, or connection_lost, or a line that is no reply.
    """
    if line is None:
        raise connection_lost(doing)
    try:
        reply = decode_json(line, type=Reply)
    except MALFORMED as e:
        raise BangerError("operation_failed", f"{doing}: the peer's reply is malformed: {e}") from e
    if reply.error is not None:
        raise reply.error.exception()
    return reply
