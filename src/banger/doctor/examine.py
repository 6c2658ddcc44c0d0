"""Running the checks: all at once, because most of them wait; mending, and looking again.

A check that fails in a way nobody thought of is a row too: doctor itself always answers.
"""

from __future__ import annotations

import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from banger.doctor.check import failed
from banger.doctor.table import CHECKS
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from banger.api.doctor import DoctorRow
    from banger.doctor.check import Check, Need
    from banger.doctor.world import World
    from banger.progress import Reporter

_AT_ONCE = 12


def examine(world: World, report: Reporter, checks: Sequence[Check] = CHECKS) -> list[DoctorRow]:
    """The rows of all checks that apply, in the order of the table. Changes nothing."""
    report.stage("examine", f"looking at {len(checks)} things")
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        futures = [pool.submit(_rows, check, world) for check in checks]
        return [row for future in futures for row in future.result()]


def mend(
    rows: Iterable[DoctorRow],
    world: World,
    look_again: Callable[[], World],
    report: Reporter,
    checks: Sequence[Check] = CHECKS,
) -> list[DoctorRow]:
    """Do what is marked as fixable, then look at everything again; the rows say what was done.

    `look_again` gives a world without what this one has found out. What could not be mended is
    said in the row, which keeps its level.
    """
    before = list(rows)
    wanted = {row.check for row in before if row.fixable and row.level != "PASS"}
    did: dict[str, tuple[str, ...]] = {}
    for check in checks:
        if check.name in wanted and check.fix is not None:
            did[check.name] = _mend_one(check, world, report)
    if not did:
        return before
    after = examine(look_again(), report, checks)
    return [_with_deeds(row, did) for row in after]


def _mend_one(check: Check, world: World, report: Reporter) -> tuple[str, ...]:
    assert check.fix is not None
    done: list[str] = []
    try:
        done.extend(check.fix(world, report))
    except (BangerError, OSError) as e:
        done.append(f"could not mend it: {e}")
    return tuple(done)


def _with_deeds(row: DoctorRow, did: dict[str, tuple[str, ...]]) -> DoctorRow:
    # Said once, in the first row of the check.
    fixed = did.pop(row.check, ())
    return msgspec.structs.replace(row, fixed=fixed) if fixed else row


def _rows(check: Check, world: World) -> list[DoctorRow]:
    try:
        if not all(_applies(need, world) for need in check.needs):
            return []
        return [finding.row(check.name) for finding in check.look(world)]
    except Exception as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        return [
            failed(f"this could not be looked at: {type(e).__name__}: {e}", where).row(check.name)
        ]


def _applies(need: Need, world: World) -> bool:
    if need == "bridge":
        return world.network == "bridge"
    return world.paths.mode == "system"
