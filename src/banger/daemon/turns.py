"""The order of work on the workspaces of one VM: one piece at a time, in the order of asking.

A turn is held while data goes to a client at that client's pace, who may have been stopped, or
reads in a pager. That is its own affair until somebody else wants the turn: then a client that has
taken nothing for a minute has lost it, and its call ends as if it had left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from banger.rpc.server import Call

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
_LOOK_S = 1.0


class Turns:
    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._sending: Call | None = None
        """Whose client has the turn's data sent to it."""

    @contextlib.asynccontextmanager
    async def take(self, *, sending: Call | None) -> AsyncIterator[None]:
        """Wait for the turn, and have it; `sending` is the call that hands out data meanwhile."""
        if self._lock.locked():
            watching = asyncio.create_task(self._watch())
            try:
                await self._lock.acquire()
            finally:
                watching.cancel()
        else:
            await self._lock.acquire()
        self._sending = sending
        try:
            yield
        finally:
            self._sending = None
            self._lock.release()

    async def _watch(self) -> None:
        while True:
            call = self._sending
            if call is not None and call.untaken_s > PATIENCE_S:
                log.warning(
                    "%s %s is given up: its client took nothing for %.0f s, and others wait",
                    call.operation.kind, call.operation.target, call.untaken_s,
                )  # fmt: skip
                self._sending = None
                call.operation.cancel()
            await asyncio.sleep(_LOOK_S)
