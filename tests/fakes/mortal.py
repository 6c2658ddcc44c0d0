"""An operation whose daemon can be killed under it: from then on not one more line of it runs.

A coroutine is driven by hand. Killed, it stays where it is suspended, with all that it holds, as a
process does that `kill -9` has ended; nothing of it is undone. Its frames are unwound when the test
is over and nobody looks any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class Mortal:
    """Await it in place of the coroutine. `kill` takes effect when it is next suspended."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self._killed = False
        self.dead = asyncio.Event()

    def kill(self) -> None:
        self._killed = True

    def __await__(self) -> Generator[Any, Any, Any]:
        send: Any = None
        error: BaseException | None = None
        while True:
            try:
                waits_for = self._work.throw(error) if error else self._work.send(send)
            except StopIteration as e:
                return e.value
            send = error = None
            try:
                if self._killed and not self.dead.is_set():
                    self.dead.set()
                    if waits_for is not None:
                        # Whatever it waited for is nobody's business any more.
                        waits_for._asyncio_future_blocking = False
                    yield from asyncio.Event().wait().__await__()
                send = yield waits_for
            except BaseException as e:
                error = e

    async def run(self) -> Any:
        return await self
