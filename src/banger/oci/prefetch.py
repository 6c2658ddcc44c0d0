"""One stage of a pipeline in a thread of its own: decompressing and hashing run beside the rest.

Both release the interpreter's lock, so that a second processor is used. The thread lives as long
as the block and has ended when it is left, whatever ended it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_AHEAD = 4


@contextlib.contextmanager
def prefetched(pieces: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """The same pieces, made a few ahead. What making them raises, taking them raises."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    unwanted = threading.Event()

    ended = False

    def make() -> None:
        end: BaseException | None = None
        try:
            for piece in pieces:
                if unwanted.is_set():
                    break
                ready.put(piece)
        except BaseException as e:
            end = e
        ready.put(end)

    def take() -> Iterator[bytes]:
        nonlocal ended
        while not ended:
            piece = ready.get()
            if isinstance(piece, bytes):
                yield piece
                continue
            ended = True
            if piece is not None:
                raise piece

    thread = threading.Thread(target=make, daemon=True, name="layer")
    thread.start()
    try:
        yield take()
    finally:
        unwanted.set()
        # It may be waiting for room, and its last word is always the end.
        while not ended:
            ended = not isinstance(ready.get(), bytes)
        thread.join()
