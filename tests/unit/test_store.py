"""The store: names, addresses, references, migrations."""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.store.database import migrations, open_database
from banger.store.vms import VmStore
from fakes.records import build_record

SUBNET = ipaddress.IPv4Network("172.16.0.0/29")
HOST = frozenset({"172.16.0.1"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VmStore]:
    store = VmStore(open_database(tmp_path / "banger.db"))
    yield store
    store.close()


@pytest.fixture
def reserve(store: VmStore) -> Callable[..., VmRecord]:
    return lambda name=None: store.reserve(name, SUBNET, HOST, build_record)


def test_the_lowest_free_address_is_given_and_comes_back(
    store: VmStore, reserve: Callable[..., VmRecord]
) -> None:
    first, second = reserve("a"), reserve("b")
    assert [first.address, second.address] == ["172.16.0.2", "172.16.0.3"]
    store.delete(first.id)
    assert reserve("c").address == "172.16.0.2"


def test_a_name_in_use_is_refused_and_leaves_no_row(
    store: VmStore, reserve: Callable[..., VmRecord]
) -> None:
    reserve("web")
    with pytest.raises(BangerError) as caught:
        reserve("web")
    assert caught.value.code == "already_exists"
    assert [vm.name for vm in store.list()] == ["web"]


def test_no_free_address_is_its_own_error(reserve: Callable[..., VmRecord]) -> None:
    for _ in range(5):
        reserve()
    with pytest.raises(BangerError) as caught:
        reserve()
    assert caught.value.reason == "address_exhausted"


def test_a_vm_is_found_by_name_id_and_unique_prefix(
    store: VmStore, reserve: Callable[..., VmRecord]
) -> None:
    vm = reserve("web")
    assert store.resolve("web") == store.resolve(vm.id) == store.resolve(vm.id[:4]) == vm
    with pytest.raises(BangerError) as caught:
        store.resolve(vm.id[:3])
    assert caught.value.code == "not_found"


def test_a_near_name_is_suggested(store: VmStore, reserve: Callable[..., VmRecord]) -> None:
    reserve("web-server")
    with pytest.raises(BangerError, match="did you mean 'web-server'"):
        store.resolve("web-sever")


def test_an_ambiguous_prefix_names_its_candidates(store: VmStore) -> None:
    for name, start in (("a", "abcd1"), ("b", "abcd2")):
        vm_id = (start + "0" * 32)[:32]
        store.reserve(
            name,
            SUBNET,
            HOST,
            lambda n, a, i=vm_id: VmRecord(**{**_fields(build_record(n, a)), "id": i}),
        )
    with pytest.raises(BangerError) as caught:
        store.resolve("abcd")
    assert caught.value.reason == "ambiguous_ref"
    assert "a (abcd1000)" in caught.value.message


def _fields(record: VmRecord) -> dict[str, object]:
    return {f: getattr(record, f) for f in record.__struct_fields__}


def test_updates_of_a_deleted_vm_are_refused(
    store: VmStore, reserve: Callable[..., VmRecord]
) -> None:
    vm = reserve("web")
    store.delete(vm.id)
    with pytest.raises(BangerError) as caught:
        store.update(vm.id, state="running")
    assert caught.value.code == "not_found"


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    open_database(path).close()
    newer = len(migrations()) + 1
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {newer}")
    connection.close()
    with pytest.raises(BangerError) as caught:
        open_database(path)
    assert caught.value.code == "bad_version"
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (newer,)
    connection.close()


def test_every_connection_has_its_pragmas(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "banger.db")
    try:
        got = [
            connection.execute(f"PRAGMA {p}").fetchone()[0]
            for p in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        ]
    finally:
        connection.close()
    assert got == ["wal", 1, 2, 5000]


def test_a_damaged_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    path.write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(BangerError, match="banger.db"):
        open_database(path)
