"""The command line, killed by `kill -9` when so many bytes have passed between it and the guest.

The number is the first argument. Who watches such a transfer from outside comes too late for it on
a machine that is busy, or fast. What was received before the last frame has been worked on by then.
"""

from __future__ import annotations

import os
import signal
import sys

from banger.cli.entry import main
from banger.rpc.blocking import BlockingChannel
from banger.rpc.frames import FrameType

_left = int(sys.argv.pop(1))
_write_frame, _read_frame = BlockingChannel.write_frame, BlockingChannel.read_frame


def _count(passed: int) -> None:
    global _left
    _left -= passed
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def write_frame(channel: BlockingChannel, kind: FrameType, payload: bytes = b"") -> None:
    _write_frame(channel, kind, payload)
    _count(len(payload))


_received = 0


def read_frame(channel: BlockingChannel) -> tuple[FrameType, bytes] | None:
    global _received
    _count(_received)
    frame = _read_frame(channel)
    _received = len(frame[1]) if frame else 0
    return frame


BlockingChannel.write_frame = write_frame  # type: ignore[method-assign]
BlockingChannel.read_frame = read_frame  # type: ignore[method-assign]
main()
