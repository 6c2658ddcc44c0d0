"""Taps in store: made before they are wanted, because a kernel takes its time to make and to
delete one.

A pool belongs to one bridge and one ledger and exists only where it was asked for. Its taps are up
and on the bridge, and mute: the rules let nothing pass that no lease's elements allow. A tap is in
the pool's file from before it is made until after it is deleted, also while a lease holds it; so
whoever finds one after a crash knows whose it is, and an idle one is simply one in no lease.
Changes are made under the host lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from banger_root import nft, vmm
from banger_root.bridge import (
    attach_tap,
    check_bridge,
    ensure_bridge,
    is_idle_tap,
    remove_bridge_if_unused,
    remove_tap,
)
from banger_root.errors import HelperError
from banger_root.host_lock import host_lock
from banger_root.ledger import POOL_LOCK, Pool
from banger_root.netlink import Rtnetlink
from banger_root.tap import make_tap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from banger_root.ledger import Entry, Ledger
    from banger_root.validate import Bridge, PoolPlan

BATCH = 8


class TapPool:
    """The pools of one ledger."""

    def __init__(self, ledger: Ledger, *, owner_uid: int) -> None:
        self._ledger = ledger
        self._owner_uid = owner_uid

    def take(self, rt: Rtnetlink, bridge: Bridge) -> str | None:
        """The name of an idle tap of the bridge, None where there is none.

        It is taken when it is in the ledger as a lease's, before the host lock is released.
        """
        pool = self._find(bridge)
        if pool is None:
            return None
        idle = self._idle(rt, pool, self._ledger.entries()[0])
        return idle[0] if idle else None

    def take_back(self, rt: Rtnetlink, entry: Entry, *, reuse: bool) -> None:
        """Make the tap of a lease idle again where the pool wants it, else delete it.

        `reuse`: whether everything that was bound to the tap is gone.

        Raises:
            HelperError, OSError: the kernel refused.
        """
        bridge = entry.plan.bridge
        pool = self._find(bridge)
        if pool is not None and entry.tap in pool.taps:
            others = [e for e in self._ledger.entries()[0] if e.id != entry.id]
            idle = self._idle(rt, pool, others)
            if reuse and entry.tap in idle and len(idle) <= pool.size:
                attach_tap(rt, entry.tap, bridge, isolate=True, alias=self._ledger.mark)
                return
            # The lease names it still: at every moment one of the two does.
            self._ledger.save_pool(replace(pool, taps=_without(pool.taps, {entry.tap})))
        remove_tap(rt, entry.tap, alias=self._ledger.mark)

    def set_size(self, plan: PoolPlan) -> int:
        """Make or delete taps until as many are idle as are wanted; how many are.

        Pools of other bridges end: a daemon has one bridge.

        Raises:
            HelperError: the bridge cannot be made, or of a whole batch of taps none could.
        """
        # One at a time fills: two would make twice as many as are missing.
        with self._ledger.locked_lease(POOL_LOCK):
            for pool in self._pools():
                if pool.bridge != plan.bridge:
                    self._shrink(pool.bridge, 0)
            before = -1
            while True:
                # Between batches others may have the host.
                with host_lock(), Rtnetlink() as rt:
                    pool = self._refresh(rt, plan)
                    entries, _ = self._ledger.entries()
                    idle = self._idle(rt, pool, entries)
                    if len(idle) >= plan.size or len(idle) <= before:
                        break
                    before = len(idle)
                    self._make_batch(rt, pool, plan.size - len(idle))
            return self._shrink(plan.bridge, plan.size)

    def describe(self) -> list[dict[str, object]]:
        """Every pool, with the names of its idle taps."""
        entries, _ = self._ledger.entries()
        with Rtnetlink() as rt:
            return [
                {
                    "bridge": pool.bridge.name,
                    "size": pool.size,
                    "idle": self._idle(rt, pool, entries),
                }
                for pool in self._pools()
            ]

    def count_idle(self) -> int:
        """How many taps are idle, in all pools."""
        entries, _ = self._ledger.entries()
        with Rtnetlink() as rt:
            return sum(len(self._idle(rt, pool, entries)) for pool in self._pools())

    def names(self) -> set[str]:
        """Every tap that is in a pool's file."""
        return {tap for pool in self._pools() for tap in pool.taps}

    def _pools(self) -> list[Pool]:
        pools, _ = self._ledger.pools()
        boot = vmm.read_boot_id()
        # What another kernel had is gone, and its names may be somebody else's by now.
        return [p if p.boot_id == boot else replace(p, taps=(), boot_id=boot) for p in pools]

    def _find(self, bridge: Bridge) -> Pool | None:
        return next((pool for pool in self._pools() if pool.bridge == bridge), None)

    def _idle(self, rt: Rtnetlink, pool: Pool, entries: Iterable[Entry]) -> list[str]:
        links = {link.name: link for link in rt.links()}
        bridge = links.get(pool.bridge.name)
        taken = {entry.tap for entry in entries if "tap" in entry.held}
        return [
            tap
            for tap in pool.taps
            if tap not in taken
            and is_idle_tap(
                links.get(tap), bridge, owner_uid=self._owner_uid, alias=self._ledger.mark
            )
        ]

    def _get(self, rt: Rtnetlink, bridge: Bridge, size: int) -> Pool:
        """The pool with its new size, rid of taps that are gone or were left half made."""
        pool = self._find(bridge)
        if pool is None:
            return Pool(bridge=bridge, size=size, taps=(), boot_id=vmm.read_boot_id())
        entries, _ = self._ledger.entries()
        kept = {entry.tap for entry in entries if "tap" in entry.held}
        kept.update(self._idle(rt, pool, entries))
        for link in rt.links():
            # One without an alias is ours, too: it is made under this name, then marked.
            if link.name in pool.taps and link.alias in ("", self._ledger.mark):
                if link.carrier:
                    kept.add(link.name)
                elif link.name not in kept:
                    remove_tap(rt, link.name, alias=self._ledger.mark)
        return replace(pool, size=size, taps=tuple(tap for tap in pool.taps if tap in kept))

    def _refresh(self, rt: Rtnetlink, plan: PoolPlan) -> Pool:
        pool = self._get(rt, plan.bridge, plan.size)
        if plan.size > 0:
            check_bridge(rt, plan.bridge)
        self._ledger.save_pool(pool)
        if plan.size > 0:
            ensure_bridge(rt, plan.bridge)
            # Before the first tap is up: without rules it would not be mute.
            nft.ensure_layout()
        return pool

    def _make_batch(self, rt: Rtnetlink, pool: Pool, missing: int) -> None:
        names = _free_names(rt, pool.taps, min(BATCH, missing))
        pool = replace(pool, taps=(*pool.taps, *names))
        self._ledger.save_pool(pool)
        failed: dict[str, HelperError | OSError] = {}
        for name in names:
            try:
                make_tap(name, owner_uid=self._owner_uid)
                attach_tap(rt, name, pool.bridge, isolate=True, alias=self._ledger.mark)
            except (HelperError, OSError) as e:
                failed[name] = e
                remove_tap(rt, name, alias=self._ledger.mark)
        if failed:
            self._ledger.save_pool(replace(pool, taps=_without(pool.taps, failed)))
        if len(failed) == len(names):
            error = next(iter(failed.values()))
            raise HelperError(
                "operation_failed",
                f"filling the tap pool of {pool.bridge.name}: {error}",
                hint="ip -d link show type tun",
            ) from error

    def _shrink(self, bridge: Bridge, size: int) -> int:
        """Delete idle taps beyond a size, and the bridge with the last one; how many are idle."""
        with host_lock(), Rtnetlink() as rt:
            pool = self._get(rt, bridge, size)
            idle = self._idle(rt, pool, self._ledger.entries()[0])
            for tap in idle[size:]:
                remove_tap(rt, tap, alias=self._ledger.mark)
            self._ledger.save_pool(replace(pool, taps=_without(pool.taps, idle[size:])))
            if size == 0:
                remove_bridge_if_unused(rt, bridge)
                nft.remove_tables_if_unused(link.name for link in rt.links())
        return min(len(idle), size)


def _free_names(rt: Rtnetlink, ours: tuple[str, ...], count: int) -> list[str]:
    """Names that neither a link nor an element of the rules has: it would let the tap speak."""
    taken = {link.name for link in rt.links()} | set(ours)
    taken |= {part for e in nft.read_elements() or () for part in e.parts}
    names: list[str] = []
    number = 0
    while len(names) < count:
        if (name := f"tap-pool-{number}") not in taken:
            names.append(name)
        number += 1
    return names


def _without(taps: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    dropped = set(names)
    return tuple(tap for tap in taps if tap not in dropped)
