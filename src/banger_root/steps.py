"""How the objects of one lease are made and given back, step by step.

Each step is noted in the ledger before it is done and struck off after it is undone, so whoever
comes after a crash finds at least what exists. The order: the tap exists, but is down, before
elements name it, and goes after them, so that no name in the rules ever means a stranger's tap.
The caller holds the lease's lock and the host lock.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from banger_root import cgroup, conntrack, forward, jail, nft, scope
from banger_root.bridge import attach_tap, ensure_bridge, remove_bridge_if_unused
from banger_root.errors import HelperError
from banger_root.ledger import STEPS
from banger_root.netlink import Rtnetlink
from banger_root.tap import make_tap

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger_root.ledger import Entry, Ledger
    from banger_root.pool import TapPool


class Steps:
    """Makes and undoes leases of one owner in one ledger."""

    def __init__(
        self,
        ledger: Ledger,
        pool: TapPool,
        *,
        owner_uid: int,
        with_cgroup: bool,
        jail_base: str | None,
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._owner_uid = owner_uid
        self._with_cgroup = with_cgroup
        self._jail_base = jail_base

    def make(self, entry: Entry) -> Entry:
        """Make everything that the entry's plan asks for; the entry, ready.

        Raises:
            HelperError: everything made so far was given back; what could not is attached.
        """
        plan = entry.plan
        try:
            self._ledger.save(entry)
            with Rtnetlink() as rt:
                entry = self._hold(entry, "bridge")
                ensure_bridge(rt, plan.bridge)
                taken = self._pool.take(rt, plan.bridge)
                entry = self._hold(replace(entry, tap=taken or plan.own_tap), "tap")
                if taken is None:
                    try:
                        make_tap(entry.tap, owner_uid=self._owner_uid)
                    except HelperError:
                        # It made nothing; a tap that somebody made since the check is not ours.
                        entry = replace(entry, held=entry.held[:-1])
                        raise
                entry = self._hold(entry, "elements")
                nft.add_elements(plan, entry.tap)
                if plan.nat:
                    forward.let_through(plan.bridge.name)
                attach_tap(
                    rt, entry.tap, plan.bridge, isolate=plan.isolate, alias=self._ledger.mark
                )
            if self._with_cgroup:
                entry = self._hold(entry, "cgroup")
                path = cgroup.make_cgroup(plan.vm_id, mark=self._ledger.mark)
                if path is None:
                    entry = replace(entry, held=entry.held[:-1])
                else:
                    scope.bound_cgroup(path, vcpu=plan.vcpu, memory_mib=plan.memory_mib)
            if plan.jail:
                assert self._jail_base is not None
                entry = self._hold(entry, "jail")
                jail.make_jail(self._jail_base, plan.vm_id)
            entry = replace(entry, state="ready")
            self._ledger.save(entry)
            return entry
        except (HelperError, OSError) as e:
            failure = _convert(e, f"preparing a lease for VM {plan.vm_id}")
            try:
                self.give_back(entry)
            except HelperError as rollback:
                failure.also.append(str(rollback))
            raise failure from e

    def give_back(self, entry: Entry, *, alive: Exception | None = None) -> None:
        """Undo every step that may have been made, newest first; try all, then report all.

        `alive`: why the lease's VMM could not be ended. Then the lease stays, with what is left.

        Raises:
            HelperError: the lease is still in the ledger, with the steps that failed.
        """
        failures = [] if alive is None else [str(alive)]
        left: list[str] = []
        undo: dict[str, Callable[[Rtnetlink], object]] = {
            "jail": lambda _: self._remove_jail(entry),
            "cgroup": lambda _: _remove_cgroup(entry),
            "elements": lambda rt: _remove_elements(rt, entry),
            # Only where all else is gone may the tap be somebody else's next.
            "tap": lambda rt: self._pool.take_back(rt, entry, reuse=not failures),
            "bridge": lambda rt: _remove_bridge(rt, entry, tap_left="tap" in left),
        }
        with Rtnetlink() as rt:
            # Not in the order of `held`: older helpers had another one.
            for step in reversed([step for step in STEPS if step in entry.held]):
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
                f"releasing the lease of VM {entry.id}: {'; '.join(failures)}",
                hint="banger doctor",
            )
        self._ledger.remove(entry.id)

    def mend(self, entry: Entry) -> None:
        """Give a lease that is there the elements of its plan, after NAT has changed or somebody
        has flushed all rules.

        Raises:
            HelperError, OSError
        """
        plan = entry.plan
        nft.sync_elements(plan, entry.tap)
        if plan.nat:
            forward.let_through(plan.bridge.name)

    def _hold(self, entry: Entry, step: str) -> Entry:
        """Note durably that `step` may exist from now on."""
        entry = replace(entry, held=(*entry.held, step))
        self._ledger.save(entry)
        return entry

    def _remove_jail(self, entry: Entry) -> None:
        if self._jail_base is None:
            raise HelperError(
                "operation_failed", f"this helper has no jail base to find the jail of {entry.id}"
            )
        jail.remove_jail(self._jail_base, entry.id)


def end_nat(entry: Entry) -> None:
    """What a lease without NAT must not leave behind: connections, and a way out for others.

    Raises:
        HelperError, OSError
    """
    bridge = entry.plan.bridge
    conntrack.forget_connections(entry.plan.address)
    forward.close_behind(
        bridge.name, still_used=lambda: any(a in bridge.subnet for a in nft.nat_addresses())
    )


def _remove_elements(rt: Rtnetlink, entry: Entry) -> None:
    nft.remove_elements(entry.plan, entry.tap)
    if entry.plan.nat:
        end_nat(entry)
    # For a second try, whose tap and bridge went in the first.
    nft.remove_tables_if_unused(link.name for link in rt.links())


def _remove_bridge(rt: Rtnetlink, entry: Entry, *, tap_left: bool) -> None:
    # A tap that went back to the pool stays a port; one that could not be deleted must not.
    remove_bridge_if_unused(rt, entry.plan.bridge, without=entry.tap if tap_left else "")
    nft.remove_tables_if_unused(link.name for link in rt.links())


def _remove_cgroup(entry: Entry) -> None:
    path = cgroup.find_directory(entry.id)
    if path is not None and os.path.isdir(path):
        cgroup.remove_cgroup(path)


def _convert(error: HelperError | OSError, doing: str) -> HelperError:
    if isinstance(error, HelperError):
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return HelperError(
        "operation_failed",
        f"{doing}: {error.strerror}",
        # What the helper writes of its own is its ledger, in a runtime directory.
        hint="df -h /run" if full else None,
        reason="disk_full" if full else None,
    )
