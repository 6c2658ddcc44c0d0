"""Frames of `stdio_mux_v1`: 1 byte type, 4 bytes big-endian length, payload (docs/protocol.md)."""

from __future__ import annotations

import enum
import struct

from banger.errors import BangerError

LINE_LIMIT = 1 << 20
PAYLOAD_LIMIT = 256 << 10
STDIN_CREDIT = 256 << 10

_HEADER = struct.Struct(">BI")
HEADER_BYTES = _HEADER.size


class FrameType(enum.IntEnum):
    EVENT = 0x01
    STDOUT = 0x02
    STDERR = 0x03
    STDIN = 0x04
    STDIN_CLOSE = 0x05
    CREDIT = 0x06
    RESIZE = 0x07
    SIGNAL = 0x08
    DATA = 0x09
    DATA_END = 0x0A
    EXIT = 0x0E
    RESULT = 0x0F
    ERROR = 0x10


def encode(kind: FrameType, payload: bytes = b"") -> bytes:
    """One frame.

    Raises:
        ValueError: the payload is larger than a frame may be.
    """
    if len(payload) > PAYLOAD_LIMIT:
        raise ValueError(f"a frame holds {PAYLOAD_LIMIT} bytes, not {len(payload)}")
    return _HEADER.pack(kind, len(payload)) + payload


def decode_header(header: bytes) -> tuple[FrameType, int]:
    """Type and payload length of a frame's first five bytes, checked before anything is read.

    Raises:
        BangerError: operation_failed: unknown type or a length over the limit.
    """
    kind, length = _HEADER.unpack(header)
    try:
        frame_type = FrameType(kind)
    except ValueError as e:
        raise BangerError("operation_failed", f"peer sent a frame of unknown type {kind:#x}") from e
    if length > PAYLOAD_LIMIT:
        raise BangerError("operation_failed", f"peer announced a frame of {length} bytes")
    return frame_type, length


class FrameDecoder:
    """Frames out of a byte stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[FrameType, bytes]]:
        """The frames that are complete now. Raises as `decode_header`."""
        self._buffer += data
        frames: list[tuple[FrameType, bytes]] = []
        position = 0
        while len(self._buffer) - position >= HEADER_BYTES:
            kind, length = decode_header(bytes(self._buffer[position : position + HEADER_BYTES]))
            end = position + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            frames.append((kind, bytes(self._buffer[position + HEADER_BYTES : end])))
            position = end
        del self._buffer[:position]
        return frames

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._buffer)
