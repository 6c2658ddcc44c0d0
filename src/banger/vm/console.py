"""The guest's console: its tail for errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.terminal_text import clean

if TYPE_CHECKING:
    from pathlib import Path

_TAIL_BYTES = 64 << 10


def tail(path: Path, lines: int, *, start: int = 0) -> list[str]:
    """The last `lines` lines of a console file that were written after byte `start`."""
    try:
        with path.open("rb") as f:
            f.seek(0, 2)
            end = f.tell()
            f.seek(max(start, end - _TAIL_BYTES))
            data = f.read()
    except FileNotFoundError:
        return []
    text = clean(data).decode(errors="replace")
    kept = [line for line in text.splitlines() if line.strip()]
    return kept[-lines:] if lines else []


def last_line(path: Path, *, start: int = 0) -> str:
    """The line that an error quotes: a panic's own words, else the last line."""
    lines = tail(path, 60, start=start)
    for line in lines:
        if "Kernel panic" in line:
            return line
    return lines[-1] if lines else ""
