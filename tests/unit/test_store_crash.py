"""The store under `kill -9` and power cuts at every write, and databases of every version."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.errors import BangerError
from banger.store import database
from banger.store.database import copy_path, migrations, open_database
from banger.store.look import look_at_database
from banger.store.vms import VmStore
from fakes.records import build_record
from fakes.world import MEMORY

SCHEMAS = Path(__file__).parent / "schemas"
_FRAME_HEADER, _LOG_HEADER = 24, 32  # sqlite.org/fileformat2.html, "The WAL File Format"
_SEED = 20

State = dict[str, str | None]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: who is killed leaves the same there, and nobody waits for a disk."""
    with tempfile.TemporaryDirectory(prefix="store", dir=MEMORY) as directory:
        yield Path(directory)


def state_of(store: VmStore) -> State:
    return {vm.name: vm.last_error for vm in store.list()}


def opened(path: Path) -> tuple[State, int]:
    """What a daemon finds at `path` after the crash: the VMs, and the version; it must be whole."""
    connection = open_database(path)
    store = VmStore(connection)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return state_of(store), version
    finally:
        store.close()


def changes(store: VmStore, rng: random.Random) -> Iterator[State]:
    """Random creates, updates and deletes; the state after each, before the next."""
    for number in range(1 << 20):
        vms = store.list()
        kind = rng.choice(("reserve", "update", "update", "delete")) if len(vms) > 3 else "reserve"
        if kind == "reserve":
            store.reserve(f"vm-{number}", None, frozenset(), build_record)
        elif kind == "update":
            store.update(rng.choice(vms).id, last_error="x" * rng.randrange(6000))
        else:
            store.delete(rng.choice(vms).id)
        yield state_of(store)


@contextlib.contextmanager
def child(work: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """A copy of this process that runs `work(fd)`: its pid, and the other end of the pipe."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of ours do not matter
        pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            work(write)
        finally:
            os._exit(0)
    os.close(write)
    try:
        yield pid, read
    finally:
        os.close(read)
        os.waitpid(pid, 0)


def test_a_writer_that_is_killed_loses_nothing_that_it_had_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(_SEED)
    for number in range(30):
        path = tmp_path / f"{number}.db"
        seed, last = rng.random(), rng.randrange(1, 60)

        def work(fd: int, path: Path = path, seed: float = seed) -> None:
            store = VmStore(open_database(path))
            for _ in changes(store, random.Random(seed)):
                os.write(fd, b".")

        with child(work) as (pid, pipe):
            told = 0
            while told < last and (more := os.read(pipe, 1)):
                told += len(more)
            os.kill(pid, signal.SIGKILL)
            while more := os.read(pipe, 1024):
                told += len(more)
        found, _ = opened(path)
        model = VmStore(open_database(tmp_path / "model.db"))
        states: list[State] = []
        for state in changes(model, random.Random(seed)):
            states.append(state)
            if len(states) > told:
                break
        model.close()
        for leftover in tmp_path.glob("model.db*"):
            leftover.unlink()
        # The one after the last that it told may have been finished, too.
        assert found in states[told - 1 :], f"round {number}: {told} were told"


def test_power_cut_at_each_write_of_the_log_leaves_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    connection = open_database(path)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    (page,) = connection.execute("PRAGMA page_size").fetchone()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store, log = VmStore(connection), path.with_name("banger.db-wal")
    base = path.read_bytes()
    committed: list[tuple[int, State]] = [(0, state_of(store))]
    for state in changes(store, random.Random(_SEED)):
        committed.append((log.stat().st_size, state))
        if len(committed) > 15:
            break
    written = log.read_bytes()
    store.close()
    frame = _FRAME_HEADER + page
    assert (len(written) - _LOG_HEADER) % frame == 0
    borders = range(_LOG_HEADER, len(written) + 1, frame)
    torn = [border - 100 for border in borders if border > _LOG_HEADER]
    for cut in (0, 10, *borders, *torn):
        place = tmp_path / "cut"
        place.mkdir()
        (place / "banger.db").write_bytes(base)
        (place / "banger.db-wal").write_bytes(written[:cut])
        found, _ = opened(place / "banger.db")
        assert found == [state for size, state in committed if size <= cut][-1], f"cut at {cut}"
        shutil.rmtree(place)


def test_power_cut_while_the_log_is_brought_into_the_database_leaves_it_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "banger.db"
    connection = open_database(path)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store, log = VmStore(connection), path.with_name("banger.db-wal")
    before = path.read_bytes()
    wanted: State = {}
    for number, wanted in enumerate(changes(store, random.Random(_SEED + 1))):  # noqa: B007
        if number > 30:
            break
    written = log.read_bytes()
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    after = path.read_bytes()
    store.close()
    rng = random.Random(_SEED)
    pages = len(after) // 4096
    for number in range(30):
        place = tmp_path / "cut"
        place.mkdir()
        # Any of its pages may have reached the disk by then, in any order.
        old = before.ljust(len(after), b"\0")
        arrived = [rng.random() < 0.5 for _ in range(pages)]
        mixed = b"".join(
            (after if new else old)[n * 4096 : (n + 1) * 4096] for n, new in enumerate(arrived)
        )
        (place / "banger.db").write_bytes(mixed if arrived[-1] else mixed[: max(4096, len(before))])
        (place / "banger.db-wal").write_bytes(written)
        assert opened(place / "banger.db")[0] == wanted, f"round {number}"
        shutil.rmtree(place)


# --- migrations -----------------------------------------------------------------------------------

_NEXT = """\
ALTER TABLE vms ADD COLUMN more TEXT;
UPDATE vms SET more = record;
CREATE TABLE others (id TEXT PRIMARY KEY) STRICT;
INSERT INTO others SELECT id FROM vms;
CREATE INDEX vms_more ON vms (more);
"""


@pytest.fixture
def two_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Two migrations after those that there are; the version that they lead to."""
    steps = tmp_path / "migrations"
    shutil.copytree(database._MIGRATIONS, steps)
    known = len(migrations())
    (steps / f"{known + 1:04}_next.sql").write_text(_NEXT)
    (steps / f"{known + 2:04}_after.sql").write_text("CREATE TABLE last (x TEXT) STRICT;\n")
    monkeypatch.setattr(database, "_MIGRATIONS", steps)
    return known + 2


def old_database(path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    with monkeypatch.context() as context:
        context.setattr(database, "_MIGRATIONS", Path(database.__file__).parent / "migrations")
        store = VmStore(open_database(path))
    for number in range(6):
        store.reserve(f"vm-{number}", None, frozenset(), build_record)
    state = state_of(store)
    store.close()
    return state


class _Mortal(sqlite3.Connection):
    """Kills its process after some steps of SQLite's own machine."""

    steps = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_progress_handler(self._step, 1)

    @classmethod
    def _step(cls) -> int:
        _Mortal.steps -= 1
        if _Mortal.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_a_daemon_killed_while_it_migrates_leaves_a_version_whole(
    tmp_path: Path, two_more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.db"
    wanted = old_database(old, monkeypatch)
    known = two_more - 2
    real = sqlite3.connect
    ended = False
    number = 0
    seen: set[int] = set()
    while not ended:
        number += 1
        place = tmp_path / "killed"
        place.mkdir()
        path = place / "banger.db"
        shutil.copy(old, path)

        def work(fd: int, path: Path = path, at: int = number * 13) -> None:
            _Mortal.steps = at
            monkeypatch.setattr(
                sqlite3, "connect", lambda *a, **k: real(*a, **{**k, "factory": _Mortal})
            )
            open_database(path).close()
            os.write(fd, b".")

        with child(work) as (_, pipe):
            ended = os.read(pipe, 1) == b"."
        with contextlib.closing(real(path)) as look:
            (version,) = look.execute("PRAGMA user_version").fetchone()
            tables = {n for (n,) in look.execute("SELECT name FROM sqlite_master").fetchall()}
        seen.add(version)
        assert ("others" in tables) == ("vms_more" in tables) == (version > known)
        assert ("last" in tables) == (version == two_more)
        assert opened(path) == (wanted, two_more)
        # A copy that is there is whole, and of the old version.
        if copy_path(path, known).exists():
            with contextlib.closing(real(copy_path(path, known))) as copy:
                assert copy.execute("PRAGMA user_version").fetchone() == (known,)
                assert copy.execute("SELECT count(*) FROM vms").fetchone() == (len(wanted),)
        elif version != known:
            raise AssertionError("it migrated without a copy")
        shutil.rmtree(place)
    assert seen == {known, known + 1, two_more}


def test_what_was_before_a_migration_is_kept(
    tmp_path: Path, two_more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "banger.db"
    wanted = old_database(path, monkeypatch)
    opened(path)
    copy = copy_path(path, two_more - 2)
    assert copy.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as context:
        context.setattr(database, "_MIGRATIONS", Path(database.__file__).parent / "migrations")
        assert opened(copy) == (wanted, two_more - 2)  # the older banger can have it back


def test_a_new_database_has_no_copy_of_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "banger.db")
    assert [p.name for p in tmp_path.iterdir() if ".version-" in p.name] == []


def test_a_newer_database_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute("CREATE TABLE vms (a)")
        newer.execute(f"PRAGMA user_version = {len(migrations()) + 1}")
    before = path.read_bytes()
    with pytest.raises(BangerError, match="a newer banger wrote it") as caught:
        open_database(path)
    assert (caught.value.code, caught.value.hint) == (
        "bad_version",
        "install the banger that wrote it",
    )
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["banger.db"]


def test_doctor_looks_at_an_old_database_without_migrating_it(
    tmp_path: Path, two_more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "banger.db"
    wanted = old_database(path, monkeypatch)
    before = path.read_bytes()
    look = look_at_database(path)
    assert look is not None
    assert (look.version, look.known_version, look.problems) == (two_more - 2, two_more, ())
    assert {vm.name for vm in look.vms or ()} == set(wanted)
    assert path.read_bytes() == before


# --- every version that was ever released ---------------------------------------------------------


def dump(connection: sqlite3.Connection) -> str:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return "\n".join([*connection.iterdump(), f"PRAGMA user_version = {version};"]) + "\n"


def frozen(number: int) -> Path:
    return SCHEMAS / f"{number:04}.sql"


@pytest.mark.parametrize("number", [n for n, _ in migrations()])
def test_a_released_migration_never_changes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`schemas/NNNN.sql` is a database of version NNNN as it was when that was new, with a VM.

    A new migration needs one: what this test shows as the difference, with a row of that time.
    """
    steps = migrations()[:number]
    monkeypatch.setattr(database, "migrations", lambda: steps)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as made:
        database._migrate(made, Path("unused"))
        schema = dump(made)
    kept = frozen(number).read_text() if frozen(number).exists() else ""
    assert [line for line in kept.splitlines() if not line.startswith("INSERT")] == (
        schema.splitlines()
    )


@pytest.mark.parametrize("number", [n for n, _ in migrations()])
def test_a_database_of_every_released_version_opens_with_its_vms(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "banger.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executescript(frozen(number).read_text())
    state, version = opened(path)
    assert version == len(migrations())
    assert set(state) == {"web"}
