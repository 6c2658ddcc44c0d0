"""Progress, passed down as a value: who reports does not know who draws.

A reporter lives as long as the call it belongs to. The daemon's reporter writes event frames; the
command line draws them; tests keep them in a list.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the stages of one operation. Cheap to call; never raises."""

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        """A new stage begins; `label` is for people, `stage` is the stable name of spec 4.5."""

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        """The current stage is at `done` of `total` units (bytes or items)."""

    def warn(self, message: str) -> None:
        """Something the user should know that does not stop the operation."""


class Silent:
    """A reporter nobody listens to."""

    def stage(self, stage: str, label: str, detail: str = "") -> None: ...

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def warn(self, message: str) -> None: ...
