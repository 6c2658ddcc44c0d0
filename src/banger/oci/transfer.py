"""How a transfer goes: the rate for people, and whether it still is one."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

SILENCE_S = 60.0
"""A server that says nothing for so long is given up."""
_REPORT_S = 0.25
_RATE_OVER_S = 5.0
# Slower than this, over SILENCE_S, is no transfer but somebody who holds the line.
_LEAST_BYTES_PER_S = 1024


class Stalled(Exception):
    """So little came that asking anew is better."""


class Meter:
    """Bytes of several transfers together; told to `advance(done, total, detail)` now and then."""

    def __init__(
        self,
        total: int,
        advance: Callable[[int, int | None, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._advance, self._clock = total, advance, clock
        self._guard = threading.Lock()
        self._done = 0
        self._told = 0.0
        self._window = [(clock(), 0)]

    def add(self, count: int) -> None:
        with self._guard:
            self._done += count
            now = self._clock()
            if now - self._told < _REPORT_S and self._done != self._total:
                return
            self._told = now
            self._window.append((now, self._done))
            while len(self._window) > 2 and now - self._window[1][0] > _RATE_OVER_S:
                self._window.pop(0)
            began, had = self._window[0]
            rate = max(0, self._done - had) / max(now - began, 0.001)
            words = f"{format_size(self._done)} of {format_size(self._total)}, "
            self._advance(self._done, self._total, f"{words}{format_size(int(rate))}/s")


class Watch:
    """Raises Stalled when a transfer has become a trickle."""

    def __init__(
        self, *, window_s: float = SILENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s, self._clock = window_s, clock
        self._since = clock()
        self._bytes = 0

    def saw(self, count: int) -> None:
        self._bytes += count
        now = self._clock()
        if now - self._since >= self._window_s:
            if self._bytes < _LEAST_BYTES_PER_S * self._window_s:
                raise Stalled(f"only {self._bytes} bytes came in {self._window_s:.0f} s")
            self._since, self._bytes = now, 0
