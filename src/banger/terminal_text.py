"""Bytes that a guest wrote, for a terminal: everything that would move its cursor, set its title or
make it answer is taken out.

Source: ECMA-48, 5.3 and 5.4; xterm's control sequences.
"""

from __future__ import annotations

import re

_ESCAPES = re.compile(
    rb"\x1b\[[0-9;?]*[ -/]*[@-~]"  # CSI
    rb"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC
    rb"|\x1b[@-_]"
    rb"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]"
)
_COLOURS = re.compile(rb"(\x1b\[[0-9;]*m)")
# U+0080 to U+009F in UTF-8: CSI and OSC as one character, which some terminals obey. Each run of
# the first byte is looked at once: from all of its bytes it would take its length squared.
_C1 = re.compile(rb"(?<!\xc2)\xc2++[\x80-\x9f]+")
# What may be the beginning of something that the next piece ends.
_UNFINISHED = re.compile(rb"(?:\x1b(?:\[[0-9;?]*[ -/]*|\][^\x07\x1b]*\x1b?)?|(?<!\xc2)\xc2+|\r)\Z")
_MOST_UNFINISHED = 256
_AS_BEFORE = b"\x1b[m"


def clean(data: bytes) -> bytes:
    """The bytes without control sequences, with plain newlines."""
    plain = _ESCAPES.sub(b"", data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return _C1.sub(b"", plain.replace(b"\x1b", b""))


class TerminalText:
    """The same, for what comes piece by piece. Colours and other looks of text stay on request."""

    def __init__(self, *, colours: bool = False) -> None:
        self._colours = colours
        self._coloured = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown now."""
        data = self._held + data
        tail = max(0, len(data) - _MOST_UNFINISHED)
        found = _UNFINISHED.search(data, tail)
        end = found.start() if found else len(data)
        self._held = data[end:]
        return self._clean(data[:end])

    def finish(self) -> bytes:
        """What was held back, when nothing more comes; what is printed next has no colour of it."""
        held, self._held = self._held, b""
        return self._clean(held) + (_AS_BEFORE if self._coloured else b"")

    def _clean(self, data: bytes) -> bytes:
        if not self._colours:
            return clean(data)
        # Every second piece is a colour.
        pieces = _COLOURS.split(data)
        self._coloured |= len(pieces) > 1
        return b"".join(p if n % 2 else clean(p) for n, p in enumerate(pieces))
