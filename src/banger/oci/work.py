"""What the long loops of this room need from whoever runs them: progress, cancellation, locks.

The room's functions are synchronous and run in a thread; the caller's job is passed down to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from banger.progress import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path


class Work(Reporter, Protocol):
    """A running operation. `banger.disk.background.Job` is one."""

    def check(self) -> None:
        """Called between two buffers; raises when the operation was cancelled."""

    def wait(self, seconds: float) -> None:
        """Sleep that a cancellation ends; it then raises as `check` does."""

    def interrupting(self, stop: Callable[[], None]) -> AbstractContextManager[None]:
        """While the block runs, a cancellation calls `stop`, from another thread."""

    def locked(self, path: Path) -> AbstractContextManager[None]:
        """An exclusive lock between processes and threads; waiting for it can be cancelled."""
