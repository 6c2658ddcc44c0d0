"""Leases and pools under any sequence of calls, and of deaths in the middle of them."""

from __future__ import annotations

import os
import secrets
import tempfile
from ipaddress import IPv4Address

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from banger_root import nft
from banger_root.leases import Leases
from banger_root.ledger import Ledger
from banger_root.validate import Bridge, LeasePlan, PoolPlan
from property.fake_kernel import FakeKernel, Killed, banger_elements

BRIDGE = Bridge(name="br-fc-p", address=IPv4Address("172.29.0.1"), prefix=24)
# Not root's: so it makes no cgroups, which are not what is looked at here.
OWNER = 1000


class Host(RuleBasedStateMachine):
    """Two ledgers on one host, as of two daemons."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel()
        self.directory = tempfile.TemporaryDirectory()
        self.installed = self.kernel.installed()
        self.installed.__enter__()
        self.plans: dict[tuple[int, int], LeasePlan] = {}
        self.sizes = [0, 0]
        self.crashed = False

    @initialize()
    def start(self) -> None:
        self.ledgers = [Ledger(os.path.join(self.directory.name, n)) for n in ("a", "b")]
        self.both = [Leases(ledger, owner_uid=OWNER) for ledger in self.ledgers]

    def attempt(self, who: int, call: str, *arguments: object) -> None:
        try:
            getattr(self.both[who], call)(*arguments)
        except Killed:
            self.crashed = True
        finally:
            self.kernel.fuse = None

    @rule(who=st.integers(0, 1), number=st.integers(2, 5), nat=st.booleans(), isolate=st.booleans(),
          fuse=st.none() | st.integers(0, 40))  # fmt: skip
    def prepare(self, who: int, number: int, nat: bool, isolate: bool, fuse: int | None) -> None:
        known = self.plans.get((who, number))
        # The two daemons' guests have addresses of their own.
        address = IPv4Address(f"172.29.0.{number + 100 * who}")
        plan = LeasePlan(
            vm_id=known.vm_id if known else secrets.token_hex(16),
            bridge=BRIDGE, address=address, isolate=known.isolate if known else isolate,
            announce_port=7001, nat=nat, guest_host_ports=(), vcpu=1, memory_mib=128, jail=False,
        )  # fmt: skip
        self.plans[who, number] = plan
        self.kernel.fuse = fuse
        self.attempt(who, "prepare", plan)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), fuse=st.none() | st.integers(0, 40))
    def release(self, data: st.DataObject, fuse: int | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.plans)))
        self.kernel.fuse = fuse
        self.attempt(key[0], "release", self.plans[key].vm_id)
        if not self.crashed:
            del self.plans[key]

    @rule(who=st.integers(0, 1), size=st.integers(0, 12), fuse=st.none() | st.integers(0, 80))
    def sweep(self, who: int, size: int, fuse: int | None) -> None:
        self.kernel.fuse = fuse
        self.attempt(who, "sweep", PoolPlan(bridge=BRIDGE, size=size))
        self.sizes[who] = size

    @precondition(lambda self: self.crashed)
    @rule()
    def recover(self) -> None:
        """What a daemon does when it starts: half made leases are gone, the pool has its size."""
        for who, leases in enumerate(self.both):
            leases.sweep(PoolPlan(bridge=BRIDGE, size=self.sizes[who]))
        # A change of NAT that nobody answered has happened, or has not.
        ready = {e.id: e.plan for ledger in self.ledgers for e in ledger.entries()[0]}
        self.plans = {k: ready[p.vm_id] for k, p in self.plans.items() if p.vm_id in ready}
        self.crashed = False

    @invariant()
    def no_tap_is_in_two_hands(self) -> None:
        taps = [e.tap for ledger in self.ledgers for e in ledger.entries()[0] if "tap" in e.held]
        assert len(set(taps)) == len(taps)

    @invariant()
    def a_tap_speaks_for_its_own_lease_only(self) -> None:
        by_tap = {
            e.tap: e for ledger in self.ledgers for e in ledger.entries()[0] if "tap" in e.held
        }
        links = {link.name for link in self.kernel.links()}
        for element in banger_elements(self.kernel):
            if element.set_name == "vm_ports" and element.parts[0] in links:
                entry = by_tap[element.parts[0]]
                assert element.parts[1:] == (entry.plan.mac, str(entry.plan.address))

    @invariant()
    def taps_are_mute_or_watched(self) -> None:
        if any(link.kind == "tun" and link.up for link in self.kernel.links()):
            assert self.kernel.layout

    @invariant()
    def whole_host_is_what_the_ledgers_say(self) -> None:
        if self.crashed:
            return
        entries = [e for ledger in self.ledgers for e in ledger.entries()[0]]
        assert all(e.state == "ready" for e in entries)
        assert {e.id for e in entries} == {p.vm_id for p in self.plans.values()}
        wanted = {e for entry in entries for e in nft.build_elements(entry.plan, entry.tap)}
        assert banger_elements(self.kernel) == wanted
        assert all(e.plan in self.plans.values() for e in entries)
        pooled = {tap for leases in self.both for tap in leases.pool.names()}
        there = {link.name for link in self.kernel.links() if link.kind == "tun"}
        assert there == pooled | {e.tap for e in entries}
        idle = [leases.pool.count_idle() for leases in self.both]
        assert len(there) == sum(idle) + len(entries)
        assert all(i <= size for i, size in zip(idle, self.sizes, strict=True))
        assert bool(self.kernel.find_link(BRIDGE.name)) is bool(there)

    def teardown(self) -> None:
        try:
            if self.crashed:
                self.recover()
            for (who, _), plan in self.plans.items():
                self.both[who].release(plan.vm_id)
            for who, leases in enumerate(self.both):
                leases.sweep(PoolPlan(bridge=BRIDGE, size=0))
                assert os.listdir(self.ledgers[who].directory) == []
            assert self.kernel.links() == []
            assert not self.kernel.layout
        finally:
            self.installed.__exit__(None, None, None)
            for ledger in self.ledgers:
                ledger.close()
            self.directory.cleanup()


TestHost = Host.TestCase
TestHost.settings = settings(deadline=None, max_examples=25, stateful_step_count=20)
