"""The sweep: what a crash, a lost ledger or a forgotten VM left on this host is given back.

Of leases: those half made, and those that no process has used for five minutes. Of objects: those
that are provably of this ledger and in no lease of it (taps and cgroups carry its mark; jails lie
in the service's own directory), and elements behind which there is no tap, whoever made them.
What a process uses stays. Lost rules come back, for somebody may have flushed them all.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from banger_root import cgroup, forward, jail, nft, vmm
from banger_root.bridge import remove_empty_bridge, remove_tap
from banger_root.errors import HelperError
from banger_root.host_lock import host_lock
from banger_root.netlink import Rtnetlink
from banger_root.validate import is_lease_id, is_own_tap, is_pool_tap

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger_root.leases import Leases
    from banger_root.ledger import Entry
    from banger_root.validate import PoolPlan

ORPHAN_AGE_S = 300.0


def sweep(leases: Leases, pool: PoolPlan | None) -> dict[str, Any]:
    """Do all of it, then give the pool its size; what is gone, and how many taps are idle.

    Raises:
        HelperError: everything was tried; all failures are in it.
    """
    removed: list[str] = []
    strays: list[str] = []
    failures: list[str] = []
    pooled = 0

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except (HelperError, OSError) as e:
            failures.append(str(e) if isinstance(e, HelperError) else (e.strerror or str(e)))

    entries, problems = leases.ledger.entries()
    for entry in entries:
        if entry.owner_uid == leases.owner_uid:
            attempt(lambda entry=entry: _sweep_lease(leases, entry, removed))  # type: ignore[misc]
    attempt(leases.ledger.tidy)
    attempt(lambda: _sweep_links(leases, strays))
    attempt(lambda: _sweep_cgroups(leases, strays))
    attempt(lambda: _sweep_jails(leases, strays))
    attempt(lambda: _mend(leases))
    try:
        pooled = leases.pool.set_size(pool) if pool is not None else leases.pool.count_idle()
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
    return {"removed": removed, "strays": strays, "pooled": pooled}


def _sweep_lease(leases: Leases, entry: Entry, removed: list[str]) -> None:
    try:
        with leases.ledger.locked_lease(entry.id, wait=False):
            # It may have changed since it was listed.
            current = leases.ledger.find(entry.id)
            if current is not None and (current.state != "ready" or _is_orphan(current)):
                leases.end(current)
                removed.append(current.id)
    except BlockingIOError:
        # Somebody is at work on it.
        return


def _is_orphan(entry: Entry) -> bool:
    if time.time() - entry.created_at < ORPHAN_AGE_S or vmm.is_running(entry):
        return False
    with Rtnetlink() as rt:
        tap = rt.find_link(entry.tap)
    # A tap has a carrier exactly as long as a process has it open.
    if tap is not None and tap.carrier:
        return False
    path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
    return path is None or not cgroup.is_populated(path)


def _sweep_links(leases: Leases, strays: list[str]) -> None:
    with host_lock(), Rtnetlink() as rt:
        entries, _ = leases.ledger.entries()
        claimed = {entry.tap for entry in entries} | leases.pool.names()
        found = [
            link
            for link in rt.links()
            if (is_own_tap(link.name) or is_pool_tap(link.name))
            and link.kind == "tun"
            and link.alias == leases.ledger.mark
            and not link.carrier
            and link.name not in claimed
        ]
        for link in found:
            remove_tap(rt, link.name, alias=leases.ledger.mark)
            strays.append(link.name)
        there = [link.name for link in rt.links()]
        if count := nft.remove_stale_elements(there):
            strays.append(f"{count} nft elements")
        for index in {link.master for link in found}:
            remove_empty_bridge(rt, index)
        nft.remove_tables_if_unused(link.name for link in rt.links())


def _sweep_cgroups(leases: Leases, strays: list[str]) -> None:
    with host_lock():
        # Listed first: a lease is in the ledger before its cgroup exists.
        found = cgroup.find_marked(leases.ledger.mark)
        ids = {entry.id for entry in leases.ledger.entries()[0]}
        for path in found:
            if os.path.basename(path) not in ids and not cgroup.is_populated(path):
                cgroup.remove_cgroup(path)
                strays.append(path)


def _sweep_jails(leases: Leases, strays: list[str]) -> None:
    if leases.jail_base is None:
        return
    with host_lock():
        found = _list_jails(leases.jail_base)
        ids = {entry.id for entry in leases.ledger.entries()[0]}
        for vm_id in found:
            if vm_id not in ids:
                jail.remove_jail(leases.jail_base, vm_id)
                strays.append(jail.jail_root(leases.jail_base, vm_id))


def _list_jails(base: str) -> list[str]:
    try:
        names = os.listdir(os.path.join(base, jail.PROGRAM))
    except FileNotFoundError:
        return []
    return [name for name in names if is_lease_id(name)]


def _mend(leases: Leases) -> None:
    """Rules and elements that somebody flushed: without them a running guest could forge."""
    with host_lock():
        with Rtnetlink() as rt:
            there = {link.name for link in rt.links()}
        ready = [e for e in leases.ledger.entries()[0] if e.state == "ready" and e.tap in there]
        if not ready and not leases.pool.names() & there:
            return
        # All of them, always: a flushed table keeps its sets, and with them the hash of the rules.
        nft.load_layout()
        present = nft.read_elements() or frozenset()
        for entry in ready:
            if not present.issuperset(nft.build_elements(entry.plan, entry.tap)):
                nft.sync_elements(entry.plan, entry.tap)
        for bridge in {entry.plan.bridge.name for entry in ready if entry.plan.nat}:
            forward.let_through(bridge)
