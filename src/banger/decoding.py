"""The gate to msgspec's decoders: documents into values, in any thread.

msgspec works out a type when it first meets it, and meanwhile keeps what it has of it where other
threads use it: with msgspec 0.22 two that begin at the same time may end the process with a
segmentation fault. So a type is met here first, by one thread at a time; later uses cost a look
into a set. Encoding works nothing out, and needs no gate.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# What decoding a document can raise: msgspec's errors and that of a text that is not UTF-8, which
# is none of them (both are ValueError), and that of a depth that nobody needs.
MALFORMED = (ValueError, RecursionError)

_meeting = threading.Lock()
_met: set[Any] = set()


def decode_json(data: bytes | bytearray | memoryview | str, type: type[T]) -> T:
    """Raises what `MALFORMED` names: msgspec.DecodeError where the document does not fit."""
    _meet(type)
    return msgspec.json.decode(data, type=type)


def decode_msgpack(data: bytes, type: type[T]) -> T:
    """Raises as `decode_json`."""
    _meet(type)
    return msgspec.msgpack.decode(data, type=type)


def decode_toml(data: bytes | str, type: type[T]) -> T:
    """Raises as `decode_json`."""
    _meet(type)
    return msgspec.toml.decode(data, type=type)


def convert(value: Any, type: type[T], *, from_attributes: bool = False) -> T:
    """What was decoded without a type, or another object, as one of `type`.

    Raises:
        msgspec.ValidationError: it does not fit.
    """
    _meet(type)
    return msgspec.convert(value, type=type, from_attributes=from_attributes)


def _meet(kind: Any) -> None:
    if kind not in _met:
        with _meeting:
            # Whatever its values are written as: this knows most kinds.
            msgspec.msgpack.Decoder(kind)
            _met.add(kind)
