"""SQLite opened the one way banger opens it, and migrations that go forward only.

Migrations are the numbered files of `migrations/`, each in one transaction with the version that it
leads to; before the first one runs, a copy of the database as it is stays beside it. A database
newer than the program is refused, never guessed at.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import DISK_FULL_HINT, BangerError
from banger.files import free_bytes, staging_directory, sync_directory, sync_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_MIGRATIONS = Path(__file__).parent / "migrations"
# Set on every connection. FULL: in WAL mode a commit is on disk when it returns only then; with
# NORMAL the VM that somebody was told of could be gone after the host's power was.
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
    "busy_timeout = 5000",
)
# Room that SQLite asks for when it opens its log and index; with less, a failure is about that.
_LITTLE_BYTES = 256 << 10
# For the pages of a few changes, in the log and in the database.
_ROOM_BYTES = 128 << 10


def open_database(path: Path) -> sqlite3.Connection:
    """The migrated database at `path`, made when absent.

    Raises:
        BangerError: it is newer than this program, damaged, or (reason disk_full) has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(f"opening the database {path}", path):
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            path.chmod(0o600)
            # Before anything is changed, the journal's mode included.
            _refuse_newer(connection, path)
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            _migrate(connection, path)
            keep_room(path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, *, durable: bool = True) -> Iterator[None]:
    """One transaction that is ours to write in; an error rolls it back and goes on.

    It is on disk at its end; with `durable` False no later than the next one that is.
    """
    if not durable:
        connection.execute("PRAGMA synchronous = NORMAL")
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk or an I/O error rolls back by itself: sqlite.org/lang_transaction.html.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        if not durable:
            connection.execute("PRAGMA synchronous = FULL")


@contextlib.contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """SQLite's errors as ours, saying what was being done to the database at `path`."""
    try:
        yield
    except sqlite3.Error as e:
        full = _is_full(e, path)
        raise BangerError(
            "operation_failed",
            f"{doing}: {'the disk is full' if full else e}",
            hint=DISK_FULL_HINT if full else "banger doctor",
            reason="disk_full" if full else None,
        ) from e


def _is_full(e: sqlite3.Error, path: Path) -> bool:
    code = getattr(e, "sqlite_errorcode", None)
    if code is None:
        return False
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return True
    # No room for the log's index, or for a new file, is told as these.
    return (
        code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
        and free_bytes(path.parent) < _LITTLE_BYTES
    )


@contextlib.contextmanager
def lent_room(path: Path) -> Iterator[None]:
    """For the block, let SQLite have the little room that is kept beside the database."""
    _room_path(path).unlink(missing_ok=True)
    yield


def keep_room(path: Path) -> None:
    """Keep a little room beside the database, unless there is some. Nothing fails for the lack."""
    if _room_path(path).exists():
        return
    try:
        with _room_path(path).open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, _ROOM_BYTES)
    except OSError:
        with contextlib.suppress(OSError):
            _room_path(path).unlink(missing_ok=True)


def _room_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.room")


def migrations() -> list[tuple[int, Path]]:
    """Number and file of every migration, in order."""
    found = sorted((int(p.name.split("_")[0]), p) for p in _MIGRATIONS.glob("*.sql"))
    assert [n for n, _ in found] == list(range(1, len(found) + 1)), "migrations are numbered 1…n"
    return found


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> None:
    version, known = _version(connection), len(migrations())
    if version > known:
        raise BangerError(
            "bad_version",
            f"the database {path} has version {version}, this program knows {known}: a newer "
            "banger wrote it",
            hint="install the banger that wrote it",
        )


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = _version(connection)
    steps = migrations()[version:]
    if version and steps:
        _keep_copy(connection, path, version)
    for number, file in steps:
        with transaction(connection):
            # Statement by statement: executescript would commit the open transaction first.
            statement = ""
            for line in file.read_text().splitlines(keepends=True):
                statement += line
                if sqlite3.complete_statement(statement):
                    connection.execute(statement)
                    statement = ""
            connection.execute(f"PRAGMA user_version = {number}")


def copy_path(path: Path, version: int) -> Path:
    """The copy of the database as it was before it left `version`."""
    return path.with_name(f"{path.name}.version-{version}")


def _keep_copy(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Copy the database before it is migrated, for the banger that wrote it to have it back."""
    with staging_directory(path.parent, "copy") as staging:
        copy = staging / path.name
        with contextlib.closing(sqlite3.connect(copy)) as target:
            connection.backup(target)
        copy.chmod(0o600)
        sync_file(copy)
        copy.replace(copy_path(path, version))
    sync_directory(path.parent)
