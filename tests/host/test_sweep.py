"""What a sweep clears away and what it leaves; locks that keep helpers out of each other's way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from banger_root import cgroup, jail, vmm
from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.ledger import Entry, Ledger
from banger_root.validate import LeasePlan, parse_prepare
from host.conftest import build_params, build_plan
from host.namespace import census, elements, ip, run
from host.test_helper_process import running
from host.test_leases import SWEPT_NOTHING
from host.test_pool import build_pool
from host.test_traffic import start_guest

pytestmark = pytest.mark.host

Prepared = Callable[..., LeasePlan]


def make_cgroup(name: str, mark: str) -> Path:
    path = cgroup.make_cgroup(name, mark=mark)
    if path is None:
        pytest.skip("needs a writable cgroup v2")
    return Path(path)


def test_empty_cgroup_of_no_lease_goes_and_those_of_others_stay(leases: Leases) -> None:
    ours = make_cgroup("a" * 32, leases.ledger.mark)
    theirs = make_cgroup("b" * 32, "banger-of-somebody-else")
    assert leases.sweep()["strays"] == [str(ours)]
    assert not ours.exists()
    assert theirs.exists()
    cgroup.remove_cgroup(str(theirs))


def test_cgroup_of_no_lease_with_a_process_in_it_stays(leases: Leases) -> None:
    path = make_cgroup("a" * 32, leases.ledger.mark)
    with subprocess.Popen(["sleep", "600"]) as child:
        (path / "cgroup.procs").write_text(str(child.pid))
        assert leases.sweep() == SWEPT_NOTHING
        child.kill()
    assert leases.sweep()["strays"] == [str(path)]


def test_elements_without_a_tap_go(leases: Leases, prepared: Prepared) -> None:
    plan = prepared(2)
    before = elements()
    run(
        "nft add element bridge banger vm_ports "
        "{ tap-fc-00000000 . 06:00:ac:1f:00:07 . 172.31.0.7 }"
    )
    run("nft add element inet banger vm_addresses { 172.31.0.7 }")
    run("nft add element bridge banger nat_taps { tap-fc-00000000 }")
    assert leases.sweep()["strays"] == ["3 nft elements"]
    assert elements() == before
    leases.release(plan.vm_id)


def test_taps_of_others_stay(leases: Leases) -> None:
    run("ip tuntap add tap-fc-0000000a mode tap")
    run("ip tuntap add tap-pool-7 mode tap")
    assert leases.sweep() == SWEPT_NOTHING
    for name in ("tap-fc-0000000a", "tap-pool-7"):
        run(f"ip link delete {name}")


def test_files_of_helpers_that_were_killed_go(leases: Leases) -> None:
    directory = Path(leases.ledger.directory)
    for name in (f".{'a' * 32}", f".{'a' * 32}.lock", ".br-fc-t1", ".pool.lock"):
        (directory / name).touch()
    leases.sweep()
    assert os.listdir(directory) == []


def test_lease_that_somebody_is_at_work_on_is_not_swept_and_blocks_nobody(
    leases: Leases, prepared: Prepared
) -> None:
    busy = prepared(2)
    with leases.ledger.locked_lease(busy.vm_id):
        assert leases.sweep() == SWEPT_NOTHING
        other = prepared(3)
        leases.release(other.vm_id)


def test_release_that_waits_for_a_dying_vmm_blocks_no_other_lease(
    leases: Leases, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = prepared(2)
    done = []

    def kill(entry: Entry) -> None:
        if entry.id == dying.vm_id:
            done.append(prepared(3).own_tap)
            leases.release(prepared(4).vm_id)

    monkeypatch.setattr(vmm, "kill", kill)
    leases.release(dying.vm_id)
    assert [link["ifname"] for link in ip("link show master br-fc-t1")] == done


def test_lease_whose_vmm_cannot_be_killed_stays_and_its_tap_is_nobodys_next(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases.sweep(build_pool(1))
    plan = build_plan(2)
    tap = leases.prepare(plan)["tap"]

    def fail(_: Entry) -> None:
        raise HelperError("operation_failed", "it does not die")

    with monkeypatch.context() as patch:
        patch.setattr(vmm, "kill", fail)
        with pytest.raises(HelperError, match="it does not die"):
            leases.release(plan.vm_id)
    assert tap not in census()["links"]
    assert [lease["state"] for lease in leases.status()["leases"]] == ["releasing"]
    leases.release(plan.vm_id)
    assert leases.status()["leases"] == []
    leases.sweep(build_pool(0))


def test_lease_with_a_jail_makes_it_and_its_end_removes_it(
    namespace: None, ledger: Ledger, tmp_path: Path
) -> None:
    base = tmp_path / "jail"
    tmp_path.chmod(0o755)
    leases = Leases(ledger, owner_uid=65534, served=True, jail_base=str(base))
    plan = parse_prepare({**build_params(2), "jail": True})
    lease = leases.prepare(plan)
    assert lease["jail"] == str(base / "firecracker" / plan.vm_id / "root")
    assert lease["cgroup"] is None
    assert Path(lease["jail"]).is_dir()
    stray = jail.make_jail(str(base), "e" * 32)
    assert leases.sweep()["strays"] == [stray]
    assert Path(lease["jail"]).is_dir()
    leases.release(plan.vm_id)
    assert os.listdir(base / "firecracker") == []


def test_jail_is_refused_where_there_is_no_place_for_it(leases: Leases) -> None:
    before = census()
    with pytest.raises(HelperError, match="makes no jails") as caught:
        leases.prepare(parse_prepare({**build_params(2), "jail": True}))
    assert caught.value.code == "bad_request"
    assert census() == before


def test_more_memory_than_the_host_has_is_refused(leases: Leases) -> None:
    params = {**build_params(2), "limits": {"vcpu": 1, "memory_mib": 1 << 23}}
    with pytest.raises(HelperError, match="limits.memory_mib must be at most") as caught:
        leases.prepare(parse_prepare(params))
    assert caught.value.code == "bad_request"


def test_cgroup_is_bounded_as_far_as_its_controllers_are_there(leases: Leases) -> None:
    path = leases.prepare(build_plan(2))["cgroup"]
    if path is None:
        pytest.skip("needs a writable cgroup v2")
    wanted = {"pids.max": "256", "memory.max": str(384 << 20), "cpu.max": "200000 100000"}
    there = Path(path, "cgroup.controllers").read_text().split()
    for name, value in wanted.items():
        if name.partition(".")[0] in there:
            assert Path(path, name).read_text().strip() == value


def test_lease_of_schema_1_can_be_released(leases: Leases, prepared: Prepared) -> None:
    import json

    plan = prepared(2)
    path = Path(leases.ledger.directory, f"{plan.vm_id}.json")
    document = json.loads(path.read_text())
    for name in ("tap", "scope", "pid", "start_time", "boot_id"):
        del document[name]
    for name in ("nat", "guest_host_ports", "limits", "jail"):
        del document["plan"][name]
    document["schema"] = 1
    # The order of that time.
    document["held"] = ["bridge", "elements", "tap", *document["held"][3:]]
    path.write_text(json.dumps(document))
    with closing(start_guest(plan)) as guest:
        guest.settle()
        assert leases.status()["leases"][0]["nat"] is False
    leases.release(plan.vm_id)
    assert census()["links"] == ["lo"]


def test_twenty_vms_created_and_deleted_leave_no_trace(namespace: None, tmp_path: Path) -> None:
    params = {"bridge": build_params(2)["bridge"], "size": 2}
    with running(tmp_path / "leases") as line:
        assert line.call("sweep", pool=params)["result"]["pooled"] == 2

        made: set[str] = set()

        def cycle(count: int) -> None:
            for number in range(2, 2 + count):
                plans = [build_params(n, nat=True) for n in (number, number + 100)]
                for plan in plans:
                    made.add(plan["vm_id"])
                    assert "result" in line.call("prepare", **plan)
                for plan in plans:
                    assert line.call("release", id=plan["vm_id"]) == {"result": {}}

        def traces() -> object:
            pid = line.process.pid
            mount = cgroup.find_mount()
            groups = Path(mount or "/nowhere", cgroup.PARENT)
            return (
                census(),
                sorted(f.name for f in (tmp_path / "leases").iterdir()),
                # Others may be at work in this one.
                made & set(os.listdir(groups)) if groups.is_dir() else set(),
                len(os.listdir(f"/proc/{pid}/fd")),
            )

        def memory_kib() -> int:
            """What it has made itself. Pages of programs come and go with their use, and the
            quick figures of /proc/PID/status are estimates (proc(5))."""
            text = Path(f"/proc/{line.process.pid}/smaps_rollup").read_text()
            return int(text.partition("Anonymous:")[2].split()[0])

        # The first ones fill caches and the allocator's arenas.
        cycle(3)
        before, memory = traces(), memory_kib()
        cycle(10)
        assert traces() == before
        assert memory_kib() - memory <= 256
        assert line.call("sweep", pool={**params, "size": 0})["result"]["pooled"] == 0
    assert census()["links"] == ["lo"]


MOMENTS_WITH_POOL = ["save:2", "save:3", "made:elements", "made:port", "undone:elements",
                     "undone:port"]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS_WITH_POOL)
def test_helper_killed_with_a_pooled_tap_in_hand_loses_none(
    namespace: None, tmp_path: Path, moment: str
) -> None:
    import sys

    from host.test_helper_process import DYING

    before = census()
    ledger = tmp_path / "leases"
    pool = {"bridge": build_params(2)["bridge"], "size": 2}
    params = build_params(2, nat=True)
    with running(ledger) as line:
        assert line.call("sweep", pool=pool)["result"]["pooled"] == 2
    with running(ledger, sys.executable, str(DYING), moment) as line:
        if "result" in (line.call("prepare", **params) or {}):
            assert line.call("release", id=params["vm_id"]) is None
    with running(ledger) as line:
        swept = line.call("sweep", pool=None)["result"]
        assert swept["pooled"] == 2
        assert line.call("sweep", pool={**pool, "size": 0})["result"]["pooled"] == 0
    assert census() == before
    assert os.listdir(ledger) == []
