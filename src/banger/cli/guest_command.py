"""The words after the first `--`: they are the guest's, and no option parser ever sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class GuestCommand:
    """`argv` is None when there was no `--`."""

    argv: tuple[str, ...] | None

    def required(self) -> tuple[str, ...]:
        """Raises click.UsageError when there is no command."""
        if not self.argv:
            raise click.UsageError("a command is missing; write it after --, as in: -- make test")
        return self.argv

    def refuse(self) -> None:
        """For commands that take none. Raises click.UsageError."""
        if self.argv is not None:
            raise click.UsageError("this command takes nothing after --")


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """Our words and the guest's, divided at the first `--`."""
    words = list(argv)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], tuple(words[at + 1 :])
