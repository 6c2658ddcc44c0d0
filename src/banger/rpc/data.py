"""Data frames as files, over a blocking connection: tars, lists of names, patches.

Both live as long as one exchange and own nothing: the channel is the caller's.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from banger.api.envelope import WireError
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.rpc import frames
from banger.rpc.channel import connection_lost
from banger.rpc.frames import FrameType

if TYPE_CHECKING:
    from banger.rpc.blocking import BlockingChannel

T = TypeVar("T")


class DataWriter(io.RawIOBase):
    """What is written becomes data frames; `buffered` gathers small writes."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)[: frames.PAYLOAD_LIMIT]
        self._channel.write_frame(FrameType.DATA, bytes(view))
        return len(view)

    def buffered(self) -> BinaryIO:
        return io.BufferedWriter(self, frames.PAYLOAD_LIMIT)


class DataReader(io.RawIOBase):
    """The data frames of a peer as a file that ends at data_end, or at the peer's result.

    Raises, from `read`:
        BangerError: the peer's own error; connection_lost; a frame that has no place here.
    """

    def __init__(self, channel: BlockingChannel, doing: str) -> None:
        self._channel = channel
        self._doing = doing
        self._rest = memoryview(b"")
        self.ended = False
        self.result: bytes | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = self.next_chunk()
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def next_chunk(self) -> bytes | None:
        """The payload of the next data frame; None at the end."""
        if self.ended:
            return None
        frame = self._channel.read_frame()
        if frame is None:
            raise connection_lost(self._doing)
        kind, payload = frame
        if kind is FrameType.DATA:
            return payload
        self.ended = True
        if kind is FrameType.ERROR:
            raise decode(payload, WireError, self._doing).exception()
        if kind is FrameType.RESULT:
            self.result = payload
        elif kind is not FrameType.DATA_END:
            raise BangerError("operation_failed", f"{self._doing}: unexpected frame {kind:#x}")
        return None

    def finish(self, kind: type[T]) -> T:
        """Read to the end, whatever is left, and return the result."""
        while self.next_chunk() is not None:
            pass
        while self.result is None:
            frame = self._channel.read_frame()
            if frame is None:
                raise connection_lost(self._doing)
            if frame[0] is FrameType.ERROR:
                raise decode(frame[1], WireError, self._doing).exception()
            if frame[0] is FrameType.RESULT:
                self.result = frame[1]
        return decode(self.result, kind, self._doing)

    def buffered(self) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(self, frames.PAYLOAD_LIMIT))


def decode(payload: bytes, kind: type[T], doing: str) -> T:
    """A document of the peer, checked. Raises BangerError."""
    try:
        return decode_json(payload, type=kind)
    except MALFORMED as e:
        raise BangerError("operation_failed", f"{doing}: malformed answer: {e}") from e
