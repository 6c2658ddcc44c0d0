"""The tap pool: what is in store, who gets it, what comes back, and what a crash leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from banger_root import pool as pool_module
from banger_root import steps, validate
from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.ledger import Ledger
from banger_root.validate import PoolPlan
from host.conftest import BRIDGE, BRIDGE_MAC, build_plan
from host.namespace import census, elements, ip, run
from host.tap_guest import BROADCAST, Listener, TapGuest, arp
from host.test_traffic import packets_from

pytestmark = pytest.mark.host


def build_pool(size: int, **bridge: Any) -> PoolPlan:
    plan = validate.parse_sweep({"pool": {"bridge": {**BRIDGE, **bridge}, "size": size}})
    assert plan is not None
    return plan


def ports() -> list[str]:
    return sorted(link["ifname"] for link in ip("link show master br-fc-t1"))


@pytest.fixture
def pooled(leases: Leases) -> Iterator[Leases]:
    """Leases with three idle taps."""
    assert leases.sweep(build_pool(3))["pooled"] == 3
    yield leases
    for lease in leases.status()["leases"]:
        leases.release(lease["id"])
    assert leases.sweep(build_pool(0))["pooled"] == 0


def guest_on(tap: str, number: int) -> TapGuest:
    return TapGuest(tap, f"172.31.0.{number}", "172.31.0.1", BRIDGE_MAC)


def test_pool_is_made_of_idle_isolated_taps_of_the_owner(pooled: Leases) -> None:
    assert ports() == ["tap-pool-0", "tap-pool-1", "tap-pool-2"]
    for name in ports():
        (link,) = ip(f"link show dev {name}")
        assert link["linkinfo"]["info_data"]["user"] == "root"
        assert link["linkinfo"]["info_data"]["persist"] is True
        assert link["linkinfo"]["info_slave_data"]["isolated"] is True
        assert "UP" in link["flags"]
    assert elements()["vm_ports"] == []
    assert pooled.status()["pool"] == [{"bridge": "br-fc-t1", "size": 3, "idle": ports()}]


def test_lease_takes_a_tap_and_gives_it_back(pooled: Leases) -> None:
    before = ports()
    plan = build_plan(2)
    assert pooled.prepare(plan)["tap"] == "tap-pool-0"
    assert elements()["vm_ports"] == [["tap-pool-0", plan.mac, "172.31.0.2"]]
    assert pooled.status()["pool"][0]["idle"] == ["tap-pool-1", "tap-pool-2"]
    assert pooled.prepare(plan)["tap"] == "tap-pool-0"
    pooled.release(plan.vm_id)
    assert ports() == before
    assert elements()["vm_ports"] == []


def test_isolation_of_a_pooled_tap_is_its_leases(pooled: Leases) -> None:
    tap = pooled.prepare(build_plan(2, isolate=False))["tap"]
    (link,) = ip(f"link show dev {tap}")
    assert link["linkinfo"]["info_slave_data"]["isolated"] is False
    pooled.release(pooled.status()["leases"][0]["id"])
    (link,) = ip(f"link show dev {tap}")
    assert link["linkinfo"]["info_slave_data"]["isolated"] is True


def test_empty_pool_means_a_tap_of_the_leases_own(pooled: Leases) -> None:
    plans = [build_plan(n) for n in range(2, 6)]
    taps = [pooled.prepare(plan)["tap"] for plan in plans]
    assert taps == ["tap-pool-0", "tap-pool-1", "tap-pool-2", plans[3].own_tap]
    for plan in plans:
        pooled.release(plan.vm_id)
    assert ports() == ["tap-pool-0", "tap-pool-1", "tap-pool-2"]


def test_refill_makes_what_leases_took_and_their_end_brings_no_more(pooled: Leases) -> None:
    plans = [build_plan(n) for n in (2, 3)]
    for plan in plans:
        pooled.prepare(plan)
    assert pooled.sweep(build_pool(3))["pooled"] == 3
    assert len(ports()) == 5
    for plan in plans:
        pooled.release(plan.vm_id)
    # Full: the taps of both leases were deleted, and no name of theirs is kept.
    assert len(ports()) == 3
    assert pooled.pool.names() == set(ports())


def test_tap_that_a_process_has_open_does_not_come_back(pooled: Leases) -> None:
    plan = build_plan(2)
    tap = pooled.prepare(plan)["tap"]
    with closing(guest_on(tap, 2)) as guest:
        guest.settle()
        pooled.release(plan.vm_id)
        assert tap not in ports()


def test_bridge_forgets_the_last_guest_of_a_pooled_tap(pooled: Leases) -> None:
    plan = build_plan(2)
    tap = pooled.prepare(plan)["tap"]
    with closing(guest_on(tap, 2)) as guest:
        guest.settle()
        assert plan.mac in run("bridge fdb show br br-fc-t1")
    pooled.release(plan.vm_id)
    assert plan.mac not in run("bridge fdb show br br-fc-t1")
    # And the next one is heard, on the same tap.
    assert pooled.prepare(build_plan(9))["tap"] == tap
    with closing(guest_on(tap, 9)) as guest:
        guest.settle()


def test_idle_tap_is_mute(pooled: Leases) -> None:
    with (
        closing(guest_on("tap-pool-0", 2)) as guest,
        closing(Listener("br-fc-t1")) as bridge,
        closing(guest_on(pooled.prepare(build_plan(3, isolate=False))["tap"], 3)) as other,
    ):
        assert other.tap != guest.tap
        other.settle()
        bridge.frames()
        guest.send(arp(1, guest.mac, guest.address, BROADCAST, guest.gateway))
        guest.send(guest.echo_request(guest.gateway, BRIDGE_MAC))
        other.settle()
        assert packets_from(bridge.frames(), guest.address) == 0
        assert packets_from(other.frames(), guest.address) == 0


def test_guest_on_a_pooled_tap_cannot_forge(pooled: Leases) -> None:
    tap = pooled.prepare(build_plan(2, nat=True))["tap"]
    with closing(guest_on(tap, 2)) as guest, closing(Listener("br-fc-t1")) as bridge:
        guest.settle()
        forged = [
            guest.echo_request(guest.gateway, BRIDGE_MAC, source="172.31.0.9"),
            guest.echo_request(guest.gateway, BRIDGE_MAC, source_mac="06:00:ac:1f:00:09"),
            arp(1, guest.mac, "172.31.0.9", BROADCAST, guest.gateway),
        ]
        bridge.frames()
        for frame in forged:
            guest.send(frame)
        guest.settle()
        heard = bridge.frames()
        assert packets_from(heard, "172.31.0.9") == 0
        assert [frame for frame in forged if frame in heard] == []
        assert packets_from(heard, guest.address) >= 1


@pytest.mark.parametrize(
    ("first", "second", "heard"), [(True, True, False), (False, True, False), (False, False, True)]
)
def test_guests_on_pooled_and_own_taps_hear_each_other_only_when_both_are_open(
    leases: Leases, first: bool, second: bool, heard: bool
) -> None:
    leases.sweep(build_pool(1))
    plans = build_plan(2, isolate=first), build_plan(3, isolate=second)
    taps = [leases.prepare(plan)["tap"] for plan in plans]
    assert taps == ["tap-pool-0", plans[1].own_tap]
    with closing(guest_on(taps[0], 2)) as one, closing(guest_on(taps[1], 3)) as other:
        one.settle()
        other.settle()
        question = arp(1, one.mac, one.address, BROADCAST, other.address)
        one.send(question)
        one.settle()
        assert (question in other.frames()) is heard
    for plan in plans:
        leases.release(plan.vm_id)
    leases.sweep(build_pool(0))


def test_pool_shrinks_and_ends_with_its_bridge(leases: Leases) -> None:
    before = census()
    assert leases.sweep(build_pool(12))["pooled"] == 12
    assert leases.sweep(build_pool(2))["pooled"] == 2
    assert len(ports()) == 2
    assert leases.sweep(build_pool(0))["pooled"] == 0
    assert census() == before
    assert os.listdir(leases.ledger.directory) == []


def test_pool_that_ends_leaves_leases_their_taps(leases: Leases) -> None:
    leases.sweep(build_pool(2))
    plan = build_plan(2)
    tap = leases.prepare(plan)["tap"]
    assert leases.sweep(build_pool(0))["pooled"] == 0
    assert ports() == [tap]
    leases.release(plan.vm_id)
    assert "br-fc-t1" not in census()["links"]
    assert os.listdir(leases.ledger.directory) == []


def test_pool_for_another_bridge_ends_the_first(leases: Leases) -> None:
    leases.sweep(build_pool(2))
    other = build_pool(1, name="br-fc-t2", address="172.31.1.1")
    assert leases.sweep(other)["pooled"] == 1
    assert census()["links"] == ["br-fc-t2", "lo", "tap-pool-0"]
    leases.sweep(build_pool(0, name="br-fc-t2", address="172.31.1.1"))


def test_pool_of_another_ledger_is_not_taken_from(pooled: Leases, tmp_path: Path) -> None:
    other = Leases(Ledger(str(tmp_path / "other")), owner_uid=0)
    plan = build_plan(2)
    assert other.prepare(plan)["tap"] == plan.own_tap
    assert other.sweep(build_pool(2))["pooled"] == 2
    assert len(ports()) == 6
    other.release(plan.vm_id)
    other.sweep(build_pool(0))
    assert ports() == ["tap-pool-0", "tap-pool-1", "tap-pool-2"]


def test_tap_that_vanished_is_replaced(pooled: Leases) -> None:
    run("ip link delete tap-pool-1")
    assert pooled.prepare(build_plan(2))["tap"] == "tap-pool-0"
    assert pooled.prepare(build_plan(3))["tap"] == "tap-pool-2"
    assert pooled.sweep(build_pool(3))["pooled"] == 3


def test_name_that_an_element_still_has_is_not_used_again(pooled: Leases) -> None:
    run("ip link delete tap-pool-1")
    run("nft add element bridge banger nat_taps { tap-pool-1 }")
    with pool_module.Rtnetlink() as rt:
        assert pool_module._free_names(rt, (), 2) == ["tap-pool-3", "tap-pool-4"]


def test_batch_of_which_nothing_can_be_made_is_an_error_that_leaves_nothing(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(name: str, **_: Any) -> None:
        tried.append(name)
        raise HelperError("operation_failed", "the test made it fail")

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "make_tap", fail)
        with pytest.raises(HelperError, match="the test made it fail"):
            leases.sweep(build_pool(20))
    assert len(tried) == pool_module.BATCH
    leases.sweep(build_pool(0))


def test_failed_rollback_of_rules_deletes_a_pooled_tap(
    pooled: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that stale elements may carry must not be the next guest's."""
    plan = build_plan(2)
    tap = pooled.prepare(plan)["tap"]

    def fail(*_: Any) -> None:
        raise HelperError("operation_failed", "the test made it fail")

    with monkeypatch.context() as patch:
        patch.setattr(steps.nft, "remove_elements", fail)
        with pytest.raises(HelperError, match="elements: the test made it fail"):
            pooled.release(plan.vm_id)
    assert tap not in ports()
    assert elements()["vm_ports"] == [[tap, plan.mac, "172.31.0.2"]]
    pooled.release(plan.vm_id)
    assert elements()["vm_ports"] == []


@pytest.mark.parametrize("moment", ["save_pool", "make_tap", "attach_tap"])
def test_crash_while_filling_leaves_nothing_that_the_next_sweep_does_not_own(
    leases: Leases, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = census()

    class Killed(BaseException):
        pass

    owner: Any = Ledger if moment == "save_pool" else pool_module
    real = getattr(owner, moment)

    def die(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, die)
        with pytest.raises(Killed):
            leases.sweep(build_pool(3))
    assert leases.sweep(build_pool(3))["pooled"] == 3
    assert leases.sweep(build_pool(0))["pooled"] == 0
    assert census() == before


def test_taps_of_a_lost_ledger_are_known_by_their_mark(namespace: None, tmp_path: Path) -> None:
    before = census()
    path = tmp_path / "leases"
    ledger = Ledger(str(path))
    leases = Leases(ledger, owner_uid=0)
    leases.sweep(build_pool(2))
    held = leases.prepare(build_plan(2))
    idle = leases.prepare(build_plan(3))
    foreign = Leases(Ledger(str(tmp_path / "other")), owner_uid=0)
    theirs = foreign.prepare(build_plan(4))["tap"]
    for file in path.iterdir():
        file.unlink()
    with closing(guest_on(held["tap"], 2)) as guest:
        guest.settle()
        assert leases.sweep()["strays"][:1] == [idle["tap"]]
        # What a process has open stays, with its elements.
        assert [p[0] for p in elements()["vm_ports"]] == sorted([held["tap"], theirs])
        guest.settle()
    leases.sweep()
    assert ports() == [theirs]
    foreign.release(foreign.status()["leases"][0]["id"])
    assert census() == before
    assert not [
        lease for lease in (held, idle) if lease["cgroup"] and Path(lease["cgroup"]).exists()
    ]
