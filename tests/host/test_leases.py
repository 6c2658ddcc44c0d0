"""What a lease makes on the host and what its end leaves, judged by ip and nft."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from banger_root import cgroup, nft, pool, process, steps, sweep
from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.ledger import Ledger
from banger_root.netlink import Rtnetlink
from banger_root.validate import Bridge, LeasePlan, parse_prepare
from host.conftest import BRIDGE_MAC, build_params, build_plan
from host.namespace import census, elements, ip, run

pytestmark = pytest.mark.host

Prepared = Callable[..., LeasePlan]
SWEPT_NOTHING = {"removed": [], "strays": [], "pooled": 0}


def test_first_lease_makes_the_bridge_with_its_address(prepared: Prepared) -> None:
    prepared(2)
    (link,) = ip("address show dev br-fc-t1")
    assert link["linkinfo"]["info_kind"] == "bridge"
    assert link["address"] == BRIDGE_MAC
    assert [(a["local"], a["prefixlen"], a["broadcast"]) for a in link["addr_info"]] == [
        ("172.31.0.1", 24, "172.31.0.255")
    ]
    assert "UP" in link["flags"]


def test_lease_makes_a_persistent_tap_on_an_isolated_port(prepared: Prepared) -> None:
    plan = prepared(2)
    (link,) = ip(f"link show dev {plan.own_tap}")
    assert link["linkinfo"]["info_data"] == {
        "type": "tap",
        "pi": False,
        "vnet_hdr": True,
        "multi_queue": False,
        "persist": True,
        "user": "root",
    }
    assert link["master"] == "br-fc-t1"
    assert link["linkinfo"]["info_slave_data"]["isolated"] is True
    assert "UP" in link["flags"]


def test_tap_belongs_to_the_owner(namespace: None, ledger: Ledger) -> None:
    leases = Leases(ledger, owner_uid=65534)
    plan = build_plan(2)
    result = leases.prepare(plan)
    (link,) = ip(f"link show dev {plan.own_tap}")
    leases.release(plan.vm_id)
    assert link["linkinfo"]["info_data"]["user"] == "nobody"
    assert result["cgroup"] is None


def test_no_ipv6_address_appears_on_bridge_or_tap(prepared: Prepared) -> None:
    plan = prepared(2)
    for name in ("br-fc-t1", plan.own_tap):
        (link,) = ip(f"link show dev {name}")
        assert link["inet6_addr_gen_mode"] == "none"
        assert run(f"ip -6 address show dev {name}") == ""
        assert run(f"sysctl -n net.ipv6.conf.{name}.disable_ipv6") == "1\n"


def test_lease_adds_exactly_its_elements(prepared: Prepared) -> None:
    plan = prepared(2)
    assert elements() == {
        "vm_addresses": ["172.31.0.2"],
        "host_ports": [["172.31.0.2", "172.31.0.1", 7001]],
        "nat_addresses": [],
        "open_guests": [],
        "vm_ports": [[plan.own_tap, "06:00:ac:1f:00:02", "172.31.0.2"]],
        "nat_taps": [],
        "open_ports": [],
    }


def test_lease_without_isolation_is_an_open_port(prepared: Prepared) -> None:
    plan = prepared(2, isolate=False)
    (link,) = ip(f"link show dev {plan.own_tap}")
    assert link["linkinfo"]["info_slave_data"]["isolated"] is False
    assert elements()["open_ports"] == [plan.own_tap]
    assert elements()["open_guests"] == [["br-fc-t1", "172.31.0.2", "br-fc-t1"]]


def test_pyroute2_reads_the_same_links(prepared: Prepared) -> None:
    pyroute2 = pytest.importorskip("pyroute2")
    prepared(2)
    with pyroute2.IPRoute() as judge, Rtnetlink() as rt:
        theirs = {
            link["index"]: (
                link.get_attr("IFLA_IFNAME"),
                link.get_attr("IFLA_ADDRESS"),
                link.get_attr("IFLA_MASTER") or 0,
            )
            for link in judge.get_links()
        }
        ours = {link.index: (link.name, link.mac, link.master) for link in rt.links()}
    assert ours == theirs


def test_release_gives_everything_back(namespace: None, ledger: Ledger) -> None:
    before = census()
    leases = Leases(ledger, owner_uid=0)
    plans = [build_plan(n) for n in (2, 3)]
    paths = [leases.prepare(plan)["cgroup"] for plan in plans]
    for plan in plans:
        leases.release(plan.vm_id)
    assert census() == before
    assert os.listdir(ledger.directory) == []
    assert not [p for p in paths if p is not None and Path(p).exists()]


def test_release_leaves_the_other_lease_alone(leases: Leases, prepared: Prepared) -> None:
    first, second = prepared(2), prepared(3)
    leases.release(first.vm_id)
    assert elements()["vm_ports"] == [[second.own_tap, second.mac, "172.31.0.3"]]
    assert [link["ifname"] for link in ip("link show master br-fc-t1")] == [second.own_tap]


def test_release_of_an_unknown_lease_is_fine(leases: Leases) -> None:
    assert leases.release("f" * 32) == {}


def test_release_kills_what_is_in_the_cgroup(leases: Leases) -> None:
    plan = build_plan(2)
    path = leases.prepare(plan)["cgroup"]
    if path is None:
        pytest.skip("needs a writable cgroup v2")
    with subprocess.Popen(["sleep", "600"]) as child:
        Path(path, "cgroup.procs").write_text(str(child.pid))
        leases.release(plan.vm_id)
        assert child.wait() == -9
    assert not Path(path).exists()


def test_prepare_refuses_a_vm_whose_processes_still_run(leases: Leases) -> None:
    plan = build_plan(2)
    path = cgroup.make_cgroup(plan.vm_id)
    if path is None:
        pytest.skip("needs a writable cgroup v2")
    with subprocess.Popen(["sleep", "600"]) as child:
        Path(path, "cgroup.procs").write_text(str(child.pid))
        with pytest.raises(HelperError, match="still in it"):
            leases.prepare(plan)
        assert child.poll() is None
        child.kill()
    cgroup.remove_cgroup(path)


def test_prepare_twice_returns_the_same_lease(leases: Leases) -> None:
    plan = build_plan(2)
    first = leases.prepare(plan)
    before = census()
    assert leases.prepare(plan) == first
    assert census() == before


def test_prepare_by_another_plan_is_refused(leases: Leases, prepared: Prepared) -> None:
    plan = prepared(2)
    with pytest.raises(HelperError, match="another plan"):
        leases.prepare(build_plan(3, vm_id=plan.vm_id))


def test_lease_that_a_reboot_swept_away_is_made_again(leases: Leases, prepared: Prepared) -> None:
    plan = prepared(2)
    run(f"ip link delete {plan.own_tap}")
    run("ip link delete br-fc-t1")
    run("nft flush ruleset")
    leases.prepare(plan)
    assert elements()["vm_ports"] == [[plan.own_tap, plan.mac, "172.31.0.2"]]
    assert [link["ifname"] for link in ip("link show master br-fc-t1")] == [plan.own_tap]


def test_address_of_another_lease_is_refused(leases: Leases, prepared: Prepared) -> None:
    holder = prepared(2)
    with pytest.raises(HelperError, match=holder.vm_id):
        leases.prepare(build_plan(2))


def test_address_of_another_ledger_is_refused_and_kept(prepared: Prepared, tmp_path: Path) -> None:
    prepared(2)
    before = census()
    other = Leases(Ledger(str(tmp_path / "other")), owner_uid=0)
    with pytest.raises(HelperError, match="another lease on this host"):
        other.prepare(build_plan(2))
    assert census() == before


def test_sweep_spares_the_leases_of_another_ledger(prepared: Prepared, tmp_path: Path) -> None:
    prepared(2)
    before = census()
    other = Leases(Ledger(str(tmp_path / "other")), owner_uid=0)
    assert other.sweep() == SWEPT_NOTHING
    assert census() == before


def test_last_lease_of_one_ledger_leaves_the_bridge_of_another(
    leases: Leases, prepared: Prepared, tmp_path: Path
) -> None:
    plan = prepared(2)
    other = Leases(Ledger(str(tmp_path / "other")), owner_uid=0)
    theirs = build_plan(3)
    other.prepare(theirs)
    leases.release(plan.vm_id)
    assert [link["ifname"] for link in ip("link show master br-fc-t1")] == [theirs.own_tap]
    other.release(theirs.vm_id)
    assert "br-fc-t1" not in census()["links"]


def test_two_bridges_stand_beside_each_other(prepared: Prepared) -> None:
    prepared(2)
    prepared(2, name="br-fc-t2", address="172.31.1.1")
    assert elements()["vm_addresses"] == ["172.31.0.2", "172.31.1.2"]


def test_sweep_releases_a_lease_that_no_process_uses(
    leases: Leases, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepared(2)
    assert leases.sweep() == SWEPT_NOTHING
    monkeypatch.setattr(sweep, "ORPHAN_AGE_S", 0.0)
    assert leases.sweep() == {**SWEPT_NOTHING, "removed": [plan.vm_id]}


def test_sweep_spares_a_lease_whose_tap_is_open(
    leases: Leases, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from host.tap_guest import TapGuest

    plan = prepared(2)
    monkeypatch.setattr(sweep, "ORPHAN_AGE_S", 0.0)
    guest = TapGuest(plan.own_tap, "172.31.0.2", "172.31.0.1", BRIDGE_MAC)
    assert leases.sweep() == SWEPT_NOTHING
    guest.close()
    assert leases.sweep() == {**SWEPT_NOTHING, "removed": [plan.vm_id]}


def test_foreign_link_with_the_bridge_name_is_refused_and_kept(leases: Leases) -> None:
    run("ip link add br-fc-t1 type veth peer name lan1")
    with pytest.raises(HelperError, match="a link of that name exists"):
        leases.prepare(build_plan(2))
    assert "br-fc-t1" in census()["links"]
    run("ip link delete br-fc-t1")


def test_foreign_bridge_of_that_name_is_refused_and_kept(leases: Leases) -> None:
    run("ip link add br-fc-t1 type bridge")
    with pytest.raises(HelperError, match="is not this bridge"):
        leases.prepare(build_plan(2))
    assert "br-fc-t1" in census()["links"]
    run("ip link delete br-fc-t1")


def test_taken_tap_name_is_refused_and_kept(leases: Leases) -> None:
    plan = build_plan(2)
    run(f"ip tuntap add {plan.own_tap} mode tap")
    with pytest.raises(HelperError, match="is in no lease"):
        leases.prepare(plan)
    assert plan.own_tap in census()["links"]
    run(f"ip link delete {plan.own_tap}")


def test_tap_name_taken_at_the_last_moment_is_kept(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(2)
    real = steps.ensure_bridge

    def ensure(rt: Rtnetlink, bridge: Bridge) -> None:
        real(rt, bridge)
        run(f"ip tuntap add {plan.own_tap} mode tap")

    monkeypatch.setattr(steps, "ensure_bridge", ensure)
    with pytest.raises(HelperError, match="a link of that name exists"):
        leases.prepare(plan)
    assert census()["links"] == ["lo", plan.own_tap]
    run(f"ip link delete {plan.own_tap}")


def test_missing_nft_rolls_back_and_names_the_package(
    leases: Leases, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = census()
    # The rollback cannot look at the tables either: what is left is in the ledger, in words.
    with monkeypatch.context() as patch:
        patch.setattr(process, "DIRECTORIES", ())
        with pytest.raises(HelperError, match="nft is not installed") as caught:
            leases.prepare(build_plan(2))
    assert caught.value.hint == "sudo apt-get install nftables"
    leases.sweep()
    assert census() == before
    assert os.listdir(ledger.directory) == []


STEPS = [
    (steps, "ensure_bridge"),
    (nft, "add_elements"),
    (steps, "make_tap"),
    (steps, "attach_tap"),
    (cgroup, "make_cgroup"),
]


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    # Making the tap is one step to the kernel: it cannot fail after it has made something.
    [
        (*s, when)
        for s in STEPS
        for when in ("before", "after")
        if (s[1], when) != ("make_tap", "after")
    ],
)
def test_failure_of_a_step_rolls_everything_back(
    leases: Leases,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    when: str,
) -> None:
    before = census()
    plan = build_plan(2)
    real = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> None:
        if when == "after":
            real(*arguments, **options)
        raise HelperError("operation_failed", "the test made it fail")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(HelperError, match="the test made it fail") as caught:
        leases.prepare(plan)
    assert caught.value.also == []
    assert census() == before
    assert os.listdir(ledger.directory) == []
    path = cgroup.find_directory(plan.vm_id)
    assert path is None or not Path(path).exists()


@pytest.mark.parametrize("number", range(1, 7))
def test_full_disk_under_the_ledger_rolls_everything_back(
    leases: Leases, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = census()
    real, count = ledger.save, 0

    def save(entry: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(entry)

    monkeypatch.setattr(ledger, "save", save)
    with pytest.raises(HelperError, match="No space left on device"):
        leases.prepare(build_plan(2))
    assert census() == before
    assert os.listdir(ledger.directory) == []


@pytest.mark.parametrize("step", ["cgroup", "tap", "elements", "bridge"])
def test_release_tries_every_step_and_keeps_what_failed(
    leases: Leases, ledger: Ledger, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    plan = prepared(2)
    owner: Any
    owner, name = {
        "cgroup": (cgroup, "remove_cgroup"),
        "tap": (pool, "remove_tap"),
        "elements": (nft, "remove_elements"),
        "bridge": (steps, "remove_bridge_if_unused"),
    }[step]
    entry = ledger.find(plan.vm_id)
    assert entry is not None
    if step not in entry.held:
        pytest.skip(f"needs a writable cgroup v2 for {step}")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "the test made it fail")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(HelperError, match=f"{step}: the test made it fail"):
            leases.release(plan.vm_id)
    entry = ledger.find(plan.vm_id)
    assert entry is not None
    assert entry.state == "releasing"
    # A bridge with the tap on it cannot go either.
    assert entry.held == (("bridge", "tap") if step == "tap" else (step,))


def test_rollback_failure_is_attached_to_the_first_error(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise HelperError("operation_failed", "the first failure")

    def fail_again(*_: Any, **__: Any) -> None:
        raise HelperError("operation_failed", "the second failure")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "attach_tap", fail)
        patch.setattr(steps, "remove_bridge_if_unused", fail_again)
        with pytest.raises(HelperError) as caught:
            leases.prepare(build_plan(2))
    assert caught.value.message == "the first failure"
    assert "the second failure" in str(caught.value)


@pytest.mark.parametrize(
    ("setup", "named"),
    [
        ("ip address add 172.31.0.9/32 dev lan0", "the address 172.31.0.9/32 of lan0"),
        ("ip address add 172.31.7.1/16 dev lan0", "the address 172.31.7.1/16 of lan0"),
        ("ip route add 172.31.0.0/25 dev lan0", "the route 172.31.0.0/25 dev lan0"),
        ("ip route add 172.16.0.0/12 dev lan0 table 77", "the route 172.16.0.0/12 dev lan0"),
        ("ip route add unreachable 172.31.0.128/30", "the route 172.31.0.128/30"),
    ],
)
def test_overlapping_subnet_is_refused_with_a_free_one(
    leases: Leases, setup: str, named: str
) -> None:
    run("ip link add lan0 type veth peer name lan1")
    run("ip link set lan0 up")
    run("ip link set lan1 up")
    run(setup)
    with pytest.raises(HelperError) as caught:
        leases.prepare(build_plan(2))
    run("ip route flush table 77") if "table 77" in setup else None
    if "unreachable" in setup:
        run("ip route delete unreachable 172.31.0.128/30")
    run("ip link delete lan0")
    assert named in caught.value.message
    assert caught.value.reason == "subnet_overlap"
    assert caught.value.hint is not None
    free = caught.value.hint.split('"')[1]
    # The hint is true: with it, the same lease can be made.
    params = build_params(2, address=free)
    leases.prepare(parse_prepare(params))


def test_default_routes_do_not_overlap(leases: Leases, prepared: Prepared) -> None:
    run("ip link add lan0 type veth peer name lan1")
    run("ip link set lan0 up")
    run("ip link set lan1 up")
    for route in ("default", "0.0.0.0/1", "128.0.0.0/1"):
        run(f"ip route add {route} dev lan0")
    plan = prepared(2)
    leases.release(plan.vm_id)
    run("ip link delete lan0")


def test_route_that_comes_up_later_does_not_stop_a_start(
    leases: Leases, prepared: Prepared
) -> None:
    first = prepared(2)
    run("ip link add lan0 type veth peer name lan1")
    run("ip link set lan0 up")
    run("ip link set lan1 up")
    run("ip route add 172.31.0.0/16 dev lan0")
    second = prepared(3)
    leases.release(first.vm_id)
    leases.release(second.vm_id)
    run("ip link delete lan0")


def test_status_lists_leases_and_bridges(leases: Leases, prepared: Prepared) -> None:
    plan = prepared(2)
    status = leases.status()
    (lease,) = status["leases"]
    assert lease["tap"] == plan.own_tap
    assert lease["state"] == "ready"
    assert status["bridges"] == [
        {"name": "br-fc-t1", "address": "172.31.0.1", "prefix": 24, "ports": [plan.own_tap]}
    ]


def test_lease_of_another_owner_is_out_of_reach(prepared: Prepared, ledger: Ledger) -> None:
    plan = prepared(2)
    other = Leases(ledger, owner_uid=1000)
    with pytest.raises(HelperError) as caught:
        other.release(plan.vm_id)
    assert caught.value.code == "unauthorized"
    assert other.sweep() == SWEPT_NOTHING
