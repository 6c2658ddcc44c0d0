"""The database looked at without being touched: opened read-only, never migrated."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from banger.api.records import VmRecord
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.store.database import migrations

if TYPE_CHECKING:
    from pathlib import Path

_BUSY_S = 5.0


class DatabaseLook(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the database. `problems`: what SQLite's own check found, one line each.

    `vms` is None where the rows are of a version that this program does not know.
    """

    version: int
    known_version: int
    problems: tuple[str, ...]
    vms: tuple[VmRecord, ...] | None


def look_at_database(path: Path) -> DatabaseLook | None:
    """Version, health and rows of the database; None where there is none.

    Raises:
        BangerError: operation_failed: it cannot be opened or read.
    """
    if not path.exists():
        return None
    known = len(migrations())
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_S)
        ) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            said = [text for (text,) in connection.execute("PRAGMA quick_check(10)")]
            problems = tuple(text for text in said if text != "ok")
            vms = None
            if 1 <= version <= known and not problems:
                rows = connection.execute("SELECT record FROM vms").fetchall()
                found = [decode_json(record, type=VmRecord) for (record,) in rows]
                vms = tuple(sorted(found, key=lambda vm: vm.name))
            elif version == 0:
                vms = ()
            return DatabaseLook(version=version, known_version=known, problems=problems, vms=vms)
    except (sqlite3.Error, *MALFORMED) as e:
        raise BangerError("operation_failed", f"reading the database {path}: {e}") from e
