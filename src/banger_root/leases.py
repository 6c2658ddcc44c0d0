"""Leases: what one microVM holds on the host (bridge port, tap, nft elements, cgroup).

A lease begins with `prepare` and ends with `release`. It does not end with the call that made it,
nor with the daemon or this helper: a running VM keeps its lease. The ledger is the truth; what a
crash left half made is given back by the next `prepare` or `release` of that VM, or by `sweep`.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from banger_root import VERSION, cgroup, nft
from banger_root.bridge import (
    attach_tap,
    check_bridge,
    ensure_bridge,
    find_bridges,
    remove_bridge_if_unused,
    remove_tap,
)
from banger_root.errors import HelperError
from banger_root.host_lock import host_lock
from banger_root.ledger import Entry, Ledger
from banger_root.netlink import Rtnetlink
from banger_root.tap import make_tap

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger_root.validate import LeasePlan

LEASE_LIMIT = 250
ORPHAN_AGE_S = 300.0


class Leases:
    """The leases of one owner in one ledger."""

    def __init__(self, ledger: Ledger, *, owner_uid: int) -> None:
        self._ledger = ledger
        self._owner_uid = owner_uid
        # The chains of an older helper may be loaded: ours are put in their place once.
        self._layout_loaded = False

    def prepare(self, plan: LeasePlan) -> dict[str, Any]:
        """Make a lease, or return the one that this VM has by the same plan.

        Raises:
            HelperError: everything made so far was given back; what could not is attached.
        """
        with self._ledger.locked():
            existing = self._find(plan.vm_id)
            if existing is not None and existing.state == "ready" and self._is_whole(existing):
                if existing.plan != plan:
                    raise HelperError(
                        "already_exists",
                        f"preparing a lease for VM {plan.vm_id}: it has one by another plan",
                        reason="in_use",
                    )
                return self._describe(existing)
            with host_lock():
                if existing is not None:
                    self._give_back(existing)
                self._check(plan)
                entry = Entry(
                    plan=plan,
                    owner_uid=self._owner_uid,
                    state="making",
                    held=(),
                    created_at=time.time(),
                )
                return self._describe(self._make(entry))

    def release(self, lease_id: str) -> dict[str, Any]:
        """Give back everything a lease holds; a lease that is not there is fine.

        Raises:
            HelperError: every step was tried; all failures are in it and the rest stays in the
                ledger.
        """
        with self._ledger.locked():
            entry = self._find(lease_id)
            if entry is not None:
                self._end(entry)
        return {}

    def sweep(self) -> dict[str, Any]:
        """Release what is half made, and what no process has used for five minutes.

        Raises:
            HelperError: every lease was tried; all failures are in it.
        """
        removed: list[str] = []
        failures: list[str] = []
        with self._ledger.locked():
            entries, problems = self._ledger.entries()
            for entry in entries:
                if entry.owner_uid != self._owner_uid:
                    continue
                try:
                    if entry.state != "ready" or self._is_orphan(entry):
                        self._end(entry)
                        removed.append(entry.id)
                except (HelperError, OSError) as e:
                    failures.append(str(e))
        failures += problems
        if failures:
            gone = f"; released: {', '.join(removed)}" if removed else ""
            raise HelperError(
                "operation_failed",
                f"sweeping the leases: {'; '.join(failures)}{gone}",
                hint="banger doctor",
            )
        return {"removed": removed}

    def status(self) -> dict[str, Any]:
        """The leases of the ledger and the bridges they are on."""
        with self._ledger.locked():
            entries, problems = self._ledger.entries()
        with Rtnetlink() as rt:
            bridges = find_bridges(rt, {entry.plan.bridge for entry in entries})
        return {
            "version": VERSION,
            "leases": [
                {
                    **self._describe(entry),
                    "vm_id": entry.plan.vm_id,
                    "address": str(entry.plan.address),
                    "bridge": entry.plan.bridge.name,
                    "state": entry.state,
                }
                for entry in entries
            ],
            "bridges": bridges,
            "problems": problems,
        }

    def _find(self, lease_id: str) -> Entry | None:
        entry = self._ledger.find(lease_id)
        if entry is not None and entry.owner_uid != self._owner_uid:
            raise HelperError("unauthorized", f"the lease {lease_id} belongs to another user")
        return entry

    def _check(self, plan: LeasePlan) -> None:
        """Everything that can be refused before the first object is made."""
        entries, _ = self._ledger.entries()
        doing = f"preparing a lease for VM {plan.vm_id}"
        if len(entries) >= LEASE_LIMIT:
            raise HelperError(
                "operation_failed",
                f"{doing}: there are {LEASE_LIMIT} leases",
                hint="banger vm list",
            )
        for entry in entries:
            if entry.plan.address == plan.address:
                raise HelperError(
                    "already_exists",
                    f"{doing}: the address {plan.address} is leased to VM {entry.plan.vm_id}",
                    hint="banger vm list",
                    reason="in_use",
                )
        with Rtnetlink() as rt:
            # Before it is in the ledger: what is taken now is somebody else's, not to be undone.
            if rt.find_link(plan.own_tap) is not None:
                raise HelperError(
                    "already_exists",
                    f"{doing}: a link named {plan.own_tap} exists and is in no lease",
                    hint=f"ip -d link show {plan.own_tap}",
                    reason="in_use",
                )
            check_bridge(rt, plan.bridge)
        if self._owner_uid == 0:
            cgroup.refuse_populated(plan.vm_id)

    def _make(self, entry: Entry) -> Entry:
        plan = entry.plan
        try:
            self._ledger.save(entry)
            with Rtnetlink() as rt:
                entry = self._hold(entry, "bridge")
                ensure_bridge(rt, plan.bridge)
                entry = self._hold(entry, "elements")
                nft.add_elements(plan, with_layout=not self._layout_loaded)
                self._layout_loaded = True
                entry = self._hold(entry, "tap")
                try:
                    make_tap(plan.own_tap, owner_uid=self._owner_uid)
                except HelperError:
                    # It made nothing; a tap that somebody made since the check is not ours.
                    entry = replace(entry, held=entry.held[:-1])
                    raise
                attach_tap(rt, plan)
            # Only root may move processes into a cgroup outside the owner's own.
            if self._owner_uid == 0:
                entry = self._hold(entry, "cgroup")
                if cgroup.make_cgroup(plan.vm_id) is None:
                    entry = replace(entry, held=entry.held[:-1])
            entry = replace(entry, state="ready")
            self._ledger.save(entry)
            return entry
        except (HelperError, OSError) as e:
            failure = _convert(e, f"preparing a lease for VM {plan.vm_id}")
            try:
                self._give_back(entry)
            except HelperError as rollback:
                failure.also.append(str(rollback))
            raise failure from e

    def _hold(self, entry: Entry, step: str) -> Entry:
        """Note durably that `step` may exist from now on."""
        entry = replace(entry, held=(*entry.held, step))
        self._ledger.save(entry)
        return entry

    def _end(self, entry: Entry) -> None:
        if entry.state == "ready":
            entry = replace(entry, state="releasing")
            # A full disk must not keep a lease; then a crash on the way is found by its age only.
            try:
                self._ledger.save(entry)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
        # The wait for a dying VMM can take long: not under the lock that all helpers share. The
        # tap goes after the exit, so that the VMM does not end with an error of its own. Where it
        # cannot be killed the rest goes all the same: a deleted tap is deaf, and no one reuses it.
        failure: Exception | None = None
        path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
        if path is not None:
            try:
                cgroup.kill_cgroup(path)
            except (HelperError, OSError) as e:
                failure = e
        with host_lock():
            try:
                self._give_back(entry)
            except HelperError as e:
                if failure is not None:
                    e.also.append(str(failure))
                raise

    def _give_back(self, entry: Entry) -> None:
        """Undo every step that may have been made, newest first; try all, then report all."""
        plan = entry.plan
        undo: dict[str, Callable[[Rtnetlink], object]] = {
            "cgroup": lambda _: _remove_cgroup(plan.vm_id),
            "tap": lambda rt: remove_tap(rt, plan),
            "elements": lambda _: nft.remove_elements(plan),
            "bridge": lambda rt: remove_bridge_if_unused(rt, plan),
        }
        left: list[str] = []
        failures: list[str] = []
        with Rtnetlink() as rt:
            for step in reversed(entry.held):
                try:
                    undo[step](rt)
                except (HelperError, OSError) as e:
                    left.insert(0, step)
                    failures.append(f"{step}: {e if isinstance(e, HelperError) else e.strerror}")
        if failures:
            try:
                self._ledger.save(replace(entry, state="releasing", held=tuple(left)))
            except OSError as e:
                failures.append(f"ledger: {e.strerror}")
            raise HelperError(
                "operation_failed",
                f"releasing the lease of VM {plan.vm_id}: {'; '.join(failures)}",
                hint="banger doctor",
            )
        self._ledger.remove(entry.id)

    def _is_whole(self, entry: Entry) -> bool:
        """Whether the lease's objects exist: a ledger on disk outlives a reboot, they do not."""
        with Rtnetlink() as rt:
            links = {link.name: link for link in rt.links()}
        tap, bridge = links.get(entry.plan.own_tap), links.get(entry.plan.bridge.name)
        if tap is None or bridge is None or tap.master != bridge.index:
            return False
        path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
        if path is not None and not os.path.isdir(path):
            return False
        present = nft.read_elements() or frozenset()
        return present.issuperset(nft.build_elements(entry.plan))

    def _is_orphan(self, entry: Entry) -> bool:
        if time.time() - entry.created_at < ORPHAN_AGE_S:
            return False
        with Rtnetlink() as rt:
            tap = rt.find_link(entry.plan.own_tap)
        # A tap has a carrier exactly as long as a process has it open.
        if tap is not None and tap.carrier:
            return False
        path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
        return path is None or not cgroup.is_populated(path)

    def _describe(self, entry: Entry) -> dict[str, Any]:
        path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
        return {"id": entry.id, "tap": entry.plan.own_tap, "cgroup": path}


def _remove_cgroup(vm_id: str) -> None:
    path = cgroup.find_directory(vm_id)
    if path is not None:
        cgroup.remove_cgroup(path)


def _convert(error: HelperError | OSError, doing: str) -> HelperError:
    if isinstance(error, HelperError):
        return error
    return HelperError("operation_failed", f"{doing}: {error.strerror}")
