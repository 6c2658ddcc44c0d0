"""A check: its name, when it applies, and the function that looks.

A check is a row of the table in `table.py`. It holds nothing; what it looks at is a `World`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from banger.api.doctor import DoctorRow

if TYPE_CHECKING:
    from banger.doctor.world import World
    from banger.progress import Reporter

Need = Literal["system mode", "bridge"]
"""A check without its need says nothing. "bridge": VMs have taps, made by the root helper."""

Look = Callable[["World"], Iterable["Finding"]]
Fix = Callable[["World", "Reporter"], Iterable[str]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a look found, before it is known by its check's name. See `DoctorRow`."""

    level: Literal["PASS", "WARN", "FAIL"]
    message: str
    details: tuple[str, ...] = ()
    command: str | None = None
    fixable: bool = False

    def row(self, check: str) -> DoctorRow:
        return DoctorRow(
            check=check,
            level=self.level,
            message=self.message,
            details=self.details,
            command=self.command,
            fixable=self.fixable,
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table. `meaning` and `mends` are the reference's words (docs/doctor.md).

    `fix` does the safe part of mending and yields what it did, a sentence each; it raises
    BangerError where it cannot.
    """

    name: str
    look: Look
    meaning: str
    mends: str
    needs: tuple[Need, ...] = ()
    fix: Fix | None = None


def passed(message: str, *details: str) -> Finding:
    return Finding(level="PASS", message=message, details=details)


def warned(
    message: str, *details: str, command: str | None = None, fixable: bool = False
) -> Finding:
    return Finding(level="WARN", message=message, details=details, command=command, fixable=fixable)


def failed(
    message: str, *details: str, command: str | None = None, fixable: bool = False
) -> Finding:
    return Finding(level="FAIL", message=message, details=details, command=command, fixable=fixable)


def count(number: int, singular: str, plural: str | None = None) -> str:
    """`1 lease`, `2 leases`."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
