"""SQLite opened the one way banger opens it, and migrations that go forward only.

Migrations are the numbered files of `migrations/`, each in one transaction with the version that it
leads to. A database newer than the program is refused, never guessed at.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from banger.errors import BangerError

_MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(path: Path) -> sqlite3.Connection:
    """The migrated database at `path`, made when absent.

    Raises:
        BangerError: it is newer than this program, or damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        path.chmod(0o600)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
            "busy_timeout = 5000",
        ):
            connection.execute(f"PRAGMA {pragma}")
        _migrate(connection, path)
    except sqlite3.DatabaseError as e:
        raise BangerError("operation_failed", f"opening the database {path}: {e}") from e
    return connection


def migrations() -> list[tuple[int, Path]]:
    """Number and file of every migration, in order."""
    found = sorted((int(p.name.split("_")[0]), p) for p in _MIGRATIONS.glob("*.sql"))
    assert [n for n, _ in found] == list(range(1, len(found) + 1)), "migrations are numbered 1…n"
    return found


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = migrations()
    if version > len(steps):
        raise BangerError(
            "bad_version",
            f"the database {path} has version {version}, this program knows {len(steps)}",
            hint="install the banger that wrote it",
        )
    for number, file in steps[version:]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Statement by statement: executescript would commit the open transaction first.
            statement = ""
            for line in file.read_text().splitlines(keepends=True):
                statement += line
                if sqlite3.complete_statement(statement):
                    connection.execute(statement)
                    statement = ""
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
