"""Sizes and durations as people type them (base 1024; a bare number is MiB or seconds)."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE = re.compile(r"([0-9]+)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_SCALE = {"k": KIB, "m": MIB, "g": GIB, "t": TIB}
_DURATION = re.compile(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?")


def parse_size(text: str) -> int:
    """Bytes of `4G`, `4GiB`, `512M`, `4KiB`, or a bare number of MiB.

    Raises:
        ValueError: the text is no size; the message says what is.
    """
    m = _SIZE.fullmatch(text.strip())
    if not m or (m[3] and not m[2]):
        raise ValueError(f"{text!r} is no size; write it like 512M, 4G or 4GiB")
    return int(m[1]) * _SCALE[m[2].lower() or "m"]


def format_size(size_bytes: int) -> str:
    """The shortest exact form with one letter (`8G`, `1536M`), else one decimal (`1.2G`)."""
    for letter, scale in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes >= scale and size_bytes % scale == 0:
            return f"{size_bytes // scale}{letter}"
    for letter, scale in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f}{letter}"
    return f"{size_bytes}B"


def format_duration(seconds: float) -> str:
    """As `parse_duration` reads it: `1h30m`, `45s`; `0s` for none."""
    whole = int(seconds)
    parts = ((whole // 3600, "h"), (whole // 60 % 60, "m"), (whole % 60, "s"))
    return "".join(f"{n}{letter}" for n, letter in parts if n) or "0s"


def parse_duration(text: str) -> float:
    """Seconds of `10s`, `5m`, `1h30m`; `0` is off.

    Raises:
        ValueError: the text is no duration.
    """
    text = text.strip()
    if text == "0":
        return 0.0
    m = _DURATION.fullmatch(text)
    if not text or not m:
        raise ValueError(f"{text!r} is no duration; write it like 10s, 5m or 1h30m")
    return int(m[1] or 0) * 3600 + int(m[2] or 0) * 60 + float(m[3] or 0)
