"""The guest's console: its tail for errors, its text made harmless for a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_TAIL_BYTES = 64 << 10
# Everything that moves a cursor, sets a title or answers back: guests write what they like.
_ESCAPES = re.compile(
    rb"\x1b\[[0-9;?]*[ -/]*[@-~]"  # CSI
    rb"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC
    rb"|\x1b[@-_]"
    rb"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]"
)
# U+0080 to U+009F in UTF-8: CSI and OSC as one character, which some terminals obey.
_C1 = re.compile(rb"\xc2+[\x80-\x9f]+")


def clean(data: bytes) -> bytes:
    """Console bytes without control sequences, with plain newlines."""
    plain = _ESCAPES.sub(b"", data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return _C1.sub(b"", plain.replace(b"\x1b", b""))


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
