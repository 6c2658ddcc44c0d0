"""The states of a VM as docs/reliability.md writes them down, held against what the code does.

Every world watches its rows: a change that the table does not have fails the test that made it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from banger.api.records import VmRecord
from banger.store.vms import VmStore

_DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
NONE = "none"


@cache
def documented() -> frozenset[tuple[str, str]]:
    """From and to of every row of the table of VM states; `none` is no row at all."""
    text = _DOCS.read_text()
    (table,) = re.findall(r"### VM\n.*?\n\n(\| From .*?)\n\n", text, flags=re.DOTALL)
    found = set()
    for line in table.splitlines()[2:]:
        before, after = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:3])
        found |= {(a, b) for a in before for b in after}
    return frozenset(found)


class Unwritten(AssertionError):
    """A transition that is not in the document."""


def watch_rows(patch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """From now on every store checks its changes; returns the set of what was seen."""
    seen: set[tuple[str, str]] = set()
    update, reserve, delete = VmStore.update, VmStore.reserve, VmStore.delete

    def note(before: str, after: str) -> None:
        seen.add((before, after))
        if before != after and (before, after) not in documented():
            raise Unwritten(f"{before} → {after} is not in {_DOCS.name}")

    def watched_update(store: VmStore, vm_id: str, **changes: Any) -> VmRecord:
        before = store.find(vm_id)
        if before is not None and "state" in changes:
            note(before.state, changes["state"])
        return update(store, vm_id, **changes)

    def watched_reserve(store: VmStore, *args: Any, **options: Any) -> VmRecord:
        record = reserve(store, *args, **options)
        note(NONE, record.state)
        return record

    def watched_delete(store: VmStore, vm_id: str) -> None:
        before = store.find(vm_id)
        if before is not None:
            note(before.state, NONE)
        delete(store, vm_id)

    patch.setattr(VmStore, "update", watched_update)
    patch.setattr(VmStore, "reserve", watched_reserve)
    patch.setattr(VmStore, "delete", watched_delete)
    return seen
