"""Progress on its way to one client that takes it as fast as it likes, or not at all.

What it has not taken yet is kept here, in order and bounded: of a step's figures the last ones, of
steps and warnings the newest. Values only; results are no progress, and never pass through here.
"""

from __future__ import annotations

from typing import Any

_MOST = 64
"""Of each kind."""


class Unsent:
    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def add(self, event: dict[str, Any]) -> None:
        """Keep an event until `take`; what it makes old, or what is too many, goes."""
        kind = _kind(event)
        if kind == "done":
            self._drop_figures()
        self._events.append(event)
        same = [number for number, old in enumerate(self._events) if _kind(old) == kind]
        if len(same) > _MOST:
            del self._events[same[0]]

    def _drop_figures(self) -> None:
        """Those of the step that is under way."""
        for number in range(len(self._events) - 1, -1, -1):
            match _kind(self._events[number]):
                case "done":
                    del self._events[number]
                    return
                case "stage":
                    return

    def take(self) -> list[dict[str, Any]]:
        """All of them, oldest first; they are the caller's now."""
        events, self._events = self._events, []
        return events


def _kind(event: dict[str, Any]) -> str:
    return next(kind for kind in ("stage", "warning", "done") if kind in event)
