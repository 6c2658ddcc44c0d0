"""Leases: what one microVM holds on the host (bridge port, tap, nft elements, cgroup, jail).

A lease begins with `prepare` and ends with `release`. It does not end with the call that made it,
nor with the daemon or this helper: a running VM keeps its lease. The ledger is the truth; what a
crash left half made is given back by the next `prepare` or `release` of that VM, or by `sweep`.

Two locks, in this order: the lease's own, held over every wait for its VMM, and the host's, held
for the milliseconds in which links and rules change. So a VMM that dies slowly delays nobody else.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from banger_root import VERSION, cgroup, forward, jail, nft, sweep, vmm
from banger_root.bridge import check_bridge, find_bridges
from banger_root.errors import HelperError
from banger_root.host_lock import host_lock
from banger_root.ledger import Entry, Ledger
from banger_root.netlink import Rtnetlink
from banger_root.pool import TapPool
from banger_root.steps import Steps, end_nat
from banger_root.validate import POOL_LIMIT, Bridge

if TYPE_CHECKING:
    from banger_root.validate import LeasePlan, PoolPlan

LEASE_LIMIT = 250
_DEFAULT_BRIDGE = Bridge(name="br-fc", address=IPv4Address("172.16.0.1"), prefix=24)


class Leases:
    """The leases of one owner in one ledger.

    `served`: this helper is the host's service, whose VMMs are launched by itself, so their
    cgroups are not made here. `jail_base`: where it makes jails, None where it does not.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        owner_uid: int,
        served: bool = False,
        jail_base: str | None = None,
    ) -> None:
        self.ledger = ledger
        self.owner_uid = owner_uid
        self.served = served
        self.jail_base = jail_base
        self.pool = TapPool(ledger, owner_uid=owner_uid)
        self.steps = Steps(
            ledger,
            self.pool,
            owner_uid=owner_uid,
            # Only root may move processes into a cgroup outside the owner's own.
            with_cgroup=not served and owner_uid == 0,
            jail_base=jail_base,
        )

    def prepare(self, plan: LeasePlan) -> dict[str, Any]:
        """Make a lease, or return the one that this VM has; of that one, NAT may be changed.

        Raises:
            HelperError: everything made so far was given back; what could not is attached.
        """
        doing = f"preparing a lease for VM {plan.vm_id}"
        if plan.jail and self.jail_base is None:
            raise HelperError("bad_request", f"{doing}: this helper makes no jails")
        with self.ledger.locked_lease(plan.vm_id):
            existing = self._find(plan.vm_id)
            with host_lock():
                if existing is not None and existing.state == "ready" and self._is_whole(existing):
                    if replace(existing.plan, nat=plan.nat) != plan:
                        raise HelperError(
                            "already_exists",
                            f"{doing}: it has one by another plan",
                            reason="in_use",
                        )
                    return self._describe(self._change(existing, plan, doing))
                if existing is not None:
                    self.steps.give_back(existing)
                self._check(plan, doing)
                entry = Entry(
                    plan=plan,
                    tap=plan.own_tap,
                    owner_uid=self.owner_uid,
                    state="making",
                    held=(),
                    created_at=time.time(),
                )
                return self._describe(self.steps.make(entry))

    def release(self, lease_id: str) -> dict[str, Any]:
        """Give back everything a lease holds; a lease that is not there is fine.

        Raises:
            HelperError: every step was tried; all failures are in it and the rest stays in the
                ledger.
        """
        with self.ledger.locked_lease(lease_id):
            entry = self._find(lease_id)
            if entry is not None:
                self.end(entry)
        return {}

    def status(self) -> dict[str, Any]:
        """The leases of the ledger, their bridges, the pool, and who drops what they forward."""
        entries, problems = self.ledger.entries()
        pools, damaged = self.ledger.pools()
        bridges = {e.plan.bridge for e in entries} | {p.bridge for p in pools}
        obstacles: dict[tuple[str, ...], dict[str, str]] = {}
        # Without a lease as for the bridge that a first one would most likely have.
        for bridge in bridges or {_DEFAULT_BRIDGE}:
            used = any(e.plan.nat and e.plan.bridge == bridge for e in entries)
            try:
                for obstacle in forward.find_forward_obstacles(bridge, docker_open=not used):
                    document = obstacle.describe()
                    obstacles.setdefault(tuple(document.values()), document)
            except HelperError as e:
                problems.append(e.message)
        with Rtnetlink() as rt:
            found = find_bridges(rt, bridges)
        return {
            "version": VERSION,
            "leases": [
                {
                    **self._describe(entry),
                    "vm_id": entry.plan.vm_id,
                    "address": str(entry.plan.address),
                    "bridge": entry.plan.bridge.name,
                    "state": entry.state,
                    "nat": entry.plan.nat,
                    "scope": entry.scope,
                    "pid": entry.pid,
                    "start_time": entry.start_time,
                    "boot_id": entry.boot_id,
                }
                for entry in entries
            ],
            "bridges": found,
            "pool": self.pool.describe(),
            "obstacles": list(obstacles.values()),
            "problems": problems + damaged,
            "limits": {"leases": LEASE_LIMIT, "pooled_taps": POOL_LIMIT},
        }

    def sweep(self, pool: PoolPlan | None = None) -> dict[str, Any]:
        """Give back what nobody uses, then make or delete idle taps (`sweep.sweep`).

        Raises:
            HelperError: everything was tried; all failures are in it.
        """
        return sweep.sweep(self, pool)

    def end(self, entry: Entry) -> None:
        """End the VMM of a lease and give back what the lease holds. The caller has its lock.

        Raises:
            HelperError: every step was tried.
        """
        if entry.state == "ready":
            entry = replace(entry, state="releasing")
            # A full disk must not keep a lease; then a crash on the way is found by its age only.
            try:
                self.ledger.save(entry)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
        # The wait for a dying VMM can take long: not under the lock that all helpers share. The
        # tap goes after the exit, so that the VMM does not end with an error of its own, and so
        # that nobody else gets it earlier. Where it cannot be killed the rest goes all the same:
        # a deleted tap is deaf, and no one reuses it.
        failure: Exception | None = None
        try:
            vmm.kill(entry)
            path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
            if path is not None:
                cgroup.kill_cgroup(path)
        except (HelperError, OSError) as e:
            failure = e
        with host_lock():
            self.steps.give_back(entry, alive=failure)

    def _find(self, lease_id: str) -> Entry | None:
        entry = self.ledger.find(lease_id)
        if entry is not None and entry.owner_uid != self.owner_uid:
            raise HelperError("unauthorized", f"the lease {lease_id} belongs to another user")
        return entry

    def _check(self, plan: LeasePlan, doing: str) -> None:
        """Everything that can be refused before the first object is made."""
        entries, _ = self.ledger.entries()
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
        total = _read_memory_mib()
        if plan.memory_mib > total:
            raise HelperError(
                "bad_request",
                f"limits.memory_mib must be at most {total}, what this host has, "
                f"not {plan.memory_mib}",
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
        if plan.nat:
            forward.refuse_obstacles(doing, plan.bridge)
        # One that the service launched is in a scope, and known by its lease.
        if not self.served and self.owner_uid == 0:
            cgroup.refuse_populated(plan.vm_id)

    def _change(self, entry: Entry, plan: LeasePlan, doing: str) -> Entry:
        """Give a lease that is there the NAT that is asked for, and the elements that it lost."""
        before = entry
        if plan.nat and not entry.plan.nat:
            forward.refuse_obstacles(doing, plan.bridge)
            # Before the elements: the ledger names at least what exists.
            entry = replace(entry, plan=plan)
            self.ledger.save(entry)
        try:
            self.steps.mend(replace(entry, plan=plan))
            if entry.plan.nat and not plan.nat:
                end_nat(entry)
                entry = replace(entry, plan=plan)
                self.ledger.save(entry)
        except (HelperError, OSError):
            if before.plan != entry.plan:
                # What the VM had it keeps, and no more.
                nft.sync_elements(before.plan, entry.tap)
                self.ledger.save(before)
            raise
        return entry

    def _is_whole(self, entry: Entry) -> bool:
        """Whether the lease's links, cgroup and jail exist: a ledger on disk outlives a reboot,
        they do not. Elements can be had again without harm to a running VM."""
        with Rtnetlink() as rt:
            links = {link.name: link for link in rt.links()}
        tap, bridge = links.get(entry.tap), links.get(entry.plan.bridge.name)
        if tap is None or bridge is None or tap.master != bridge.index:
            return False
        path = cgroup.find_directory(entry.id) if "cgroup" in entry.held else None
        if path is not None and not os.path.isdir(path):
            return False
        root = self._jail_root(entry)
        return root is None or os.path.isdir(root)

    def _jail_root(self, entry: Entry) -> str | None:
        if "jail" not in entry.held or self.jail_base is None:
            return None
        return jail.jail_root(self.jail_base, entry.id)

    def _describe(self, entry: Entry) -> dict[str, Any]:
        # The service's own cgroups are of no use to the owner, who cannot write there.
        path = None
        if "cgroup" in entry.held and not self.served:
            path = cgroup.find_directory(entry.id)
        return {
            "id": entry.id,
            "tap": entry.tap,
            "cgroup": path,
            "jail": self._jail_root(entry),
        }


def _read_memory_mib() -> int:
    with open("/proc/meminfo", encoding="ascii") as f:
        return int(f.readline().split()[1]) >> 10
