"""Undo for a start: what was acquired is given back by the line that acquired it.

Plain callbacks, because `pop_all` forgets callbacks but would run the `finally` of a
generator-based context manager once it is collected, which would tear down the VM that has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

Release = Callable[[], Awaitable[object]]


class Undo:
    """Runs what was pushed, newest first, every one, unless `keep` was called.

    A failure of an undo never replaces the error that made us roll back: it is attached to it.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Release]] = []

    def push(self, what: str, release: Release) -> None:
        """Before acquiring: a call whose reply was lost may still have been carried out."""
        self._steps.append((what, release))

    def keep(self) -> None:
        self._steps.clear()

    async def __aenter__(self) -> Undo:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        failures: list[str] = []
        rolling_back = bool(self._steps)
        while self._steps:
            what, release = self._steps.pop()
            try:
                await _finish(release)
            except Exception as e:
                log.warning("undoing %s: %s", what, e)
                failures.append(f"undoing {what}: {e}")
        if rolling_back and isinstance(error, BangerError):
            error.also += failures
            # What a lost reply left open is settled by having given everything back.
            error.outcome = "unknown" if failures else "failed"
        elif failures and isinstance(error, asyncio.CancelledError):
            # A cancellation is no error, and says that nothing is left; here that would be a lie.
            raise BangerError(
                "operation_failed",
                "cancelled, and what it had made could not all be given back: "
                + "; ".join(failures),
                hint="banger vm list",
                reason="cancelled",
                outcome="unknown",
            ) from error


async def _finish(release: Release) -> None:
    """Give back to the end, also when the caller is cancelled once more: what is given back half
    would belong to nobody."""
    work = asyncio.ensure_future(release())
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    work.result()
