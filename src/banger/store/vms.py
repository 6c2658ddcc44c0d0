"""VM rows: names and addresses are unique here, and nowhere else is that decided."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from banger.api.records import VmRecord
from banger.decoding import decode_json
from banger.errors import BangerError
from banger.names import generate_vm_name, short_id
from banger.store.database import explained, keep_room, lent_room, transaction

if TYPE_CHECKING:
    import ipaddress
    import sqlite3
    from collections.abc import Callable, Iterator

    from banger.api.stats import VmStats


def now_text() -> str:
    """This moment in UTC, RFC 3339, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class VmStore:
    """Reads and writes VM records. Every method is one short transaction, on disk when it returns.

    Every method raises BangerError for what SQLite says, with reason disk_full where that is it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        (_, _, name) = connection.execute("PRAGMA database_list").fetchone()
        self._path = Path(name)

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        with explained(f"{what} the database {self._path}", self._path):
            yield

    @contextlib.contextmanager
    def _writing(self, *, durable: bool = True) -> Iterator[None]:
        with self._doing("writing to"), transaction(self._db, durable=durable):
            yield
        keep_room(self._path)

    def _commit(self, statement: str, values: tuple[object, ...], *, durable: bool = True) -> None:
        """One statement as a transaction. On a full disk it is tried again in the room that is kept
        for this: what has ended must be noted then, too."""
        try:
            with self._writing(durable=durable):
                self._db.execute(statement, values)
        except BangerError as e:
            if e.reason != "disk_full":
                raise
            with lent_room(self._path), self._writing(durable=durable):
                self._db.execute(statement, values)

    def list(self) -> list[VmRecord]:
        with self._doing("reading"):
            rows = self._db.execute("SELECT record FROM vms").fetchall()
        records = [decode_json(r, type=VmRecord) for (r,) in rows]
        return sorted(records, key=lambda vm: vm.name)

    def find(self, vm_id: str) -> VmRecord | None:
        with self._doing("reading"):
            row = self._db.execute("SELECT record FROM vms WHERE id = ?", (vm_id,)).fetchone()
        return decode_json(row[0], type=VmRecord) if row else None

    def resolve(self, ref: str) -> VmRecord:
        """The VM of a name, an id, or a unique id prefix of at least 4 characters.

        Raises:
            BangerError: not_found (near names in the message), bad_request when ambiguous.
        """
        vms = self.list()
        for vm in vms:
            if ref in (vm.name, vm.id):
                return vm
        if len(ref) >= 4:
            matches = [vm for vm in vms if vm.id.startswith(ref)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                which = ", ".join(f"{vm.name} ({short_id(vm.id)})" for vm in matches)
                raise BangerError(
                    "bad_request",
                    f"{ref!r} fits several VMs: {which}",
                    hint="banger vm list",
                    reason="ambiguous_ref",
                )
        import difflib

        near = difflib.get_close_matches(ref, [vm.name for vm in vms], n=1)
        extra = f"; did you mean {near[0]!r}?" if near else ""
        raise BangerError("not_found", f"there is no VM {ref!r}{extra}", hint="banger vm list")

    def reserve(
        self,
        name: str | None,
        subnet: ipaddress.IPv4Network | None,
        taken_by_host: frozenset[str],
        build: Callable[[str, str], VmRecord],
    ) -> VmRecord:
        """Insert a new VM under a free name and the lowest free address, in one transaction.

        `name` None generates one. `subnet` None reserves no address (user-mode networking).
        `build` makes the record of a name and an address.

        Raises:
            BangerError: already_exists; operation_failed with reason address_exhausted.
        """
        with self._writing():
            rows = self._db.execute("SELECT name, address FROM vms").fetchall()
            names = {n for n, _ in rows}
            if name is None:
                name = generate_vm_name(names.__contains__)
            elif name in names:
                raise BangerError(
                    "already_exists",
                    f"a VM named {name!r} exists already",
                    hint=f"banger vm ssh {name}",
                )
            address = ""
            if subnet is not None:
                address = _lowest_free(subnet, {a for _, a in rows} | taken_by_host)
            record = build(name, address)
            self._db.execute(
                "INSERT INTO vms (id, name, address, record) VALUES (?, ?, ?, ?)",
                (record.id, record.name, address or None, msgspec.json.encode(record).decode()),
            )
        return record

    def update(self, vm_id: str, **changes: Any) -> VmRecord:
        """Change fields of a record; `updated_at` follows.

        `touched_at` alone is not waited for: each command would pay a write to the disk for a time
        whose loss harms nobody.

        Raises:
            BangerError: not_found.
        """
        record = self.find(vm_id)
        if record is None:
            raise BangerError("not_found", f"VM {short_id(vm_id)} is gone", hint="banger vm list")
        record = msgspec.structs.replace(record, updated_at=now_text(), **changes)
        self._commit(
            "UPDATE vms SET record = ? WHERE id = ?",
            (msgspec.json.encode(record).decode(), vm_id),
            durable=changes.keys() != {"touched_at"},
        )
        return record

    def keep_stats(self, vm_id: str, stats: VmStats) -> None:
        """Keep the last figures of a VM; one that is gone has none. `updated_at` stays.

        Nobody waits for it to be on disk, and on a full one it is left out: the room that is kept
        is for what matters.
        """
        record = self.find(vm_id)
        if record is not None:
            record = msgspec.structs.replace(record, stats=stats)
            with self._writing(durable=False):
                self._db.execute(
                    "UPDATE vms SET record = ? WHERE id = ?",
                    (msgspec.json.encode(record).decode(), vm_id),
                )

    def readdress(
        self,
        vm_id: str,
        subnet: ipaddress.IPv4Network,
        taken_by_host: frozenset[str],
        build: Callable[[VmRecord, str], VmRecord],
    ) -> VmRecord:
        """Give a VM the lowest free address of another subnet, in one transaction.

        Raises:
            BangerError: not_found; operation_failed with reason address_exhausted.
        """
        with self._writing():
            record = self.find(vm_id)
            if record is None:
                raise BangerError(
                    "not_found", f"VM {short_id(vm_id)} is gone", hint="banger vm list"
                )
            rows = self._db.execute("SELECT address FROM vms WHERE id != ?", (vm_id,)).fetchall()
            address = _lowest_free(subnet, {a for (a,) in rows} | taken_by_host)
            record = build(record, address)
            self._db.execute(
                "UPDATE vms SET address = ?, record = ? WHERE id = ?",
                (address, msgspec.json.encode(record).decode(), vm_id),
            )
        return record

    def delete(self, vm_id: str) -> None:
        self._commit("DELETE FROM vms WHERE id = ?", (vm_id,))


def _lowest_free(subnet: ipaddress.IPv4Network, taken: set[str]) -> str:
    for host in subnet.hosts():
        if str(host) not in taken:
            return str(host)
    raise BangerError(
        "operation_failed",
        f"no address is free in {subnet}: every VM holds one, running or not",
        hint="banger vm prune",
        reason="address_exhausted",
    )
