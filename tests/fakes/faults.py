"""Failures on order: a test says where, the fakes ask when they get there.

A point is a word such as `host.prepare`. Faults are used up as they happen, so that the same call
succeeds the next time unless the test ordered more.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from banger.errors import BangerError


def broken(point: str) -> BangerError:
    """The error that a point fails with where the test names none."""
    return BangerError("operation_failed", f"{point} failed on purpose", reason="injected")


class Faults:
    """What is to go wrong. `reached` tells a test that a hanging point was arrived at."""

    def __init__(self) -> None:
        self._failures: dict[str, deque[BaseException | None]] = {}
        self._hanging: dict[str, asyncio.Event | threading.Event] = {}
        self.passed: list[str] = []

    def fail(
        self, point: str, error: BaseException | None = None, *, times: int = 1, after: int = 0
    ) -> None:
        """Let `after` arrivals at `point` pass and the next `times` fail."""
        queue = self._failures.setdefault(point, deque())
        queue.extend([None] * after)
        queue.extend([error or broken(point)] * times)

    def hang(self, point: str) -> asyncio.Event:
        """Let the next arrival wait until it is cancelled; the event is set when it is there."""
        reached = self._hanging[point] = asyncio.Event()
        return reached

    def hang_elsewhere(self, point: str) -> threading.Event:
        """As `hang`, where what hangs is in another thread's event loop."""
        reached = self._hanging[point] = threading.Event()
        return reached

    def clear(self) -> None:
        self._failures.clear()
        self._hanging.clear()

    def check(self, point: str) -> None:
        """Arrive at a point that cannot wait."""
        self.passed.append(point)
        if (queue := self._failures.get(point)) and (error := queue.popleft()) is not None:
            raise error

    async def arrive(self, point: str) -> None:
        """Arrive at a point; raise or wait as ordered."""
        self.check(point)
        # As in a real call, others run meanwhile.
        await asyncio.sleep(0)
        if reached := self._hanging.pop(point, None):
            reached.set()
            await asyncio.Event().wait()
