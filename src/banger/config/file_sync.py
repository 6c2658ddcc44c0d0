"""`[[file_sync]]`: files of the owner's home that guests get, as the configuration names them.

Pure: nothing here looks at a file. Entries are counted from 1 in messages, as people count.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Literal

import msgspec

_KEYS = ("host", "guest", "mode", "when")
_MODE = re.compile(r"0?[0-7]{3}")
GUEST_HOME = "/root"


class FileSync(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry. `mode` is for a file; a directory's files keep their own."""

    host: str
    guest: str
    mode: str = "0600"
    when: Literal["create", "start"] = "create"

    @property
    def mode_bits(self) -> int:
        return int(self.mode, 8)

    def host_parts(self, home: Path) -> tuple[str, ...]:
        """The components of the host path below `home`. Raises ValueError naming the rule."""
        text = _checked("host", self.host)
        if text.startswith("~/"):
            return _parts("host", text[2:])
        if text.startswith("~"):
            raise ValueError("host must begin with ~/; the home of another user is not read")
        if not text.startswith("/"):
            raise ValueError("host must begin with ~/ or be an absolute path")
        for base in (home, Path(os.path.realpath(home))):
            prefix = f"{str(base).rstrip('/')}/"
            if text.startswith(prefix):
                return _parts("host", text[len(prefix) :])
        raise ValueError(f"host must lie inside {home}")

    def guest_parts(self) -> tuple[str, ...]:
        """The components of the guest path below /root. Raises ValueError naming the rule."""
        text = _checked("guest", self.guest)
        for prefix in ("~/", f"{GUEST_HOME}/"):
            if text.startswith(prefix):
                return _parts("guest", text[len(prefix) :])
        raise ValueError("guest must begin with ~/ or /root/")


def check_file_sync(entries: Any, home: Path) -> None:
    """Check the value of the key `file_sync` as TOML gave it.

    Raises:
        ValueError: the first broken rule, with the number of its entry (from 1).
    """
    if not isinstance(entries, list):
        raise ValueError("file_sync is a list of tables: write [[file_sync]]")
    for number, entry in enumerate(entries, 1):
        try:
            _check_entry(entry, home)
        except ValueError as e:
            raise ValueError(f"file_sync entry {number}: {e}") from e


def _check_entry(entry: Any, home: Path) -> None:
    if not isinstance(entry, dict):
        raise ValueError("it must be a table: write [[file_sync]]")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"unknown key `{key}`; the keys are {', '.join(_KEYS)}")
        if not isinstance(value, str):
            example = ', such as "0600"' if key == "mode" else ""
            raise ValueError(f"{key} must be a string{example} (it is {value!r})")
    for key in ("host", "guest"):
        if key not in entry:
            raise ValueError(f"{key} is missing")
    if not _MODE.fullmatch(entry.get("mode", "0600")):
        raise ValueError(f'mode must be octal, such as "0600" (it is {entry["mode"]!r})')
    if entry.get("when", "create") not in ("create", "start"):
        raise ValueError(f'when must be "create" or "start" (it is {entry["when"]!r})')
    checked = FileSync(**entry)
    try:
        checked.host_parts(home)
    except ValueError as e:
        raise ValueError(f"{e} (it is {checked.host!r})") from e
    try:
        checked.guest_parts()
    except ValueError as e:
        raise ValueError(f"{e} (it is {checked.guest!r})") from e


def _checked(key: str, text: str) -> str:
    if not text:
        raise ValueError(f"{key} must not be empty")
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise ValueError(f"{key} must have no control characters")
    if ".." in text.split("/"):
        raise ValueError(f"{key} must not contain ..")
    return text


def _parts(key: str, below: str) -> tuple[str, ...]:
    parts = tuple(part for part in below.split("/") if part not in ("", "."))
    if not parts:
        raise ValueError(f"{key} must name something below the home directory")
    return parts
