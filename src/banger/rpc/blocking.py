"""One connection without an event loop: for the command line and for worker threads.

Always reads with `recvmsg`, so that descriptors arrive. A channel owns its socket until `close`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.rpc import frames

if TYPE_CHECKING:
    from banger.rpc.frames import FrameType

_RECV = 256 << 10
_MAX_FDS = 4


class BlockingChannel:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def _fill(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _RECV, _MAX_FDS)
        except ConnectionError:
            return False
        self._fds += fds
        self._buffer += data
        return bool(data)

    def read_line(self) -> bytes | None:
        """The next line without its newline; None when the peer closed before a whole line."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            if len(self._buffer) > frames.LINE_LIMIT:
                raise BangerError("operation_failed", "a protocol line is longer than 1 MiB")
            searched = len(self._buffer)
            if not self._fill():
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def read_frame(self) -> tuple[FrameType, bytes] | None:
        """The next frame; None when the peer closed. Raises as `frames.decode_header`."""
        while True:
            if len(self._buffer) >= frames.HEADER_BYTES:
                header = bytes(self._buffer[: frames.HEADER_BYTES])
                kind, length = frames.decode_header(header)
                end = frames.HEADER_BYTES + length
                if len(self._buffer) >= end:
                    payload = bytes(self._buffer[frames.HEADER_BYTES : end])
                    del self._buffer[:end]
                    return kind, payload
            if not self._fill():
                return None

    def write_document(self, document: msgspec.Struct | dict[str, object]) -> None:
        self.sock.sendall(msgspec.json.encode(document) + b"\n")

    def write_frame(self, kind: FrameType, payload: bytes = b"") -> None:
        self.sock.sendall(frames.encode(kind, payload))

    def take_fds(self, count: int) -> list[int]:
        """The descriptors that came with the message just read; the caller owns them.

        Raises:
            BangerError: fewer arrived than the message names.
        """
        if len(self._fds) < count:
            raise BangerError(
                "operation_failed", "the daemon passed fewer descriptors than it said"
            )
        taken, self._fds = self._fds[:count], self._fds[count:]
        return taken

    def take_buffered(self) -> bytes:
        """What was read beyond the last message, for a connection that goes on as raw bytes."""
        taken, self._buffer = bytes(self._buffer), bytearray()
        return taken

    def close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = []
        self.sock.close()
