"""Room on the host's disk, asked for before a step writes (spec 4.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.errors import DISK_FULL_HINT, BangerError
from banger.files import free_bytes
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from pathlib import Path


def require_space(directory: Path, *, needed_bytes: int, reserve_bytes: int, doing: str) -> None:
    """Refuse a step that would leave less than `reserve_bytes` free on `directory`'s filesystem.

    Raises:
        BangerError: operation_failed, reason disk_full, with wanted, free and reserve in words.
    """
    free = free_bytes(existing_place(directory))
    if free - needed_bytes < reserve_bytes:
        raise BangerError(
            "operation_failed",
            f"{doing}: it needs about {_rounded(needed_bytes)} in {directory}, where "
            f"{_rounded(free)} are free and {_rounded(reserve_bytes)} are kept in reserve "
            "(disk_reserve)",
            hint=DISK_FULL_HINT,
            reason="disk_full",
        )


def existing_place(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there: on its filesystem it will be."""
    while not directory.exists():
        directory = directory.parent
    return directory


def _rounded(size_bytes: int) -> str:
    return format_size(size_bytes if size_bytes < 10 * MIB else size_bytes // MIB * MIB)
