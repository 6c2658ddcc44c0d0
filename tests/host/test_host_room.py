"""The daemon's `Host` against the real helper, in a network namespace."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from banger.errors import BangerError
from banger.host.host import Host
from banger.host.lease import LeaseId, LeasePlan
from banger.host.privilege import Privilege, find_helper
from banger.host.vmm_process import (
    ExitStatus,
    ProcessRef,
    is_alive,
    kill_vmm,
    launch_vmm,
    wait_exit,
)
from host.namespace import census, elements, ip, run
from patience import PATIENCE_S

pytestmark = [pytest.mark.host, pytest.mark.asyncio]


def build_plan(number: int, **changes: Any) -> LeasePlan:
    fields: dict[str, Any] = {
        "vm_id": secrets.token_hex(16),
        "bridge_name": "br-fc-t1",
        "bridge_address": "172.31.0.1",
        "bridge_prefix": 24,
        "guest_address": f"172.31.0.{number}",
        "isolate": True,
        "announce_port": 7001,
        "vcpu": 1,
        "memory_mib": 128,
    }
    return LeasePlan(**{**fields, **changes})


@pytest_asyncio.fixture
async def host(namespace: None, tmp_path: Path) -> AsyncIterator[Host]:
    """A host whose leases are all given back at the end."""
    before = census()
    host = await Host.open(ledger=tmp_path / "run" / "leases", log=tmp_path / "helper.log")
    yield host
    for lease in (await host.status()).leases:
        await host.release(lease.id)
    await host.aclose()
    assert census() == before


async def test_helper_starts_with_the_first_call(host: Host) -> None:
    assert host._helper is not None
    assert host._helper.pid is None
    await host.status()
    assert host._helper.pid is not None


async def test_prepare_returns_the_lease_and_release_ends_it(host: Host) -> None:
    plan = build_plan(2)
    lease = await host.prepare(plan)
    assert lease.id == plan.lease_id
    assert [link["ifname"] for link in ip("link show master br-fc-t1")] == [lease.tap]
    await host.release(lease.id)
    await host.release(lease.id)
    assert (await host.status()).leases == ()


async def test_status_knows_lease_and_bridge(host: Host) -> None:
    plan = build_plan(2)
    lease = await host.prepare(plan)
    status = await host.status()
    assert [(s.id, s.address, s.state) for s in status.leases] == [
        (lease.id, "172.31.0.2", "ready")
    ]
    assert [(b.name, b.ports) for b in status.bridges] == [("br-fc-t1", (lease.tap,))]


async def test_error_has_the_helpers_own_words_code_hint_and_reason(host: Host) -> None:
    run("ip link add lan0 type veth peer name lan1")
    run("ip link set lan0 up")
    run("ip address add 172.31.0.77/24 dev lan0")
    with pytest.raises(BangerError) as caught:
        await host.prepare(build_plan(2))
    run("ip link delete lan0")
    assert "the address 172.31.0.77/24 of lan0" in caught.value.message
    assert (caught.value.code, caught.value.reason) == ("operation_failed", "subnet_overlap")
    assert "bridge_ip" in (caught.value.hint or "")


async def test_dead_helper_is_started_again_by_the_next_call(host: Host) -> None:
    plan = build_plan(2)
    await host.prepare(plan)
    assert host._helper is not None
    first = host._helper.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert [s.vm_id for s in (await host.status()).leases] == [plan.vm_id]
    assert host._helper.pid != first


async def test_helper_that_dies_under_a_call_is_an_error_that_says_so(
    namespace: None, tmp_path: Path
) -> None:
    package = tmp_path / "helper"
    package.mkdir()
    (package / "__main__.py").write_text("import sys; sys.stdin.buffer.raw.read(1); sys.exit(3)")
    host = await Host.open(
        ledger=tmp_path / "leases", helper=package, privilege=Privilege(kind="root")
    )
    with pytest.raises(BangerError, match=r"ended \(status 3\)") as caught:
        await host.prepare(build_plan(2))
    await host.aclose()
    assert caught.value.reason == "connection_lost"


async def test_cancelled_call_is_carried_through_and_the_next_gets_its_own_answer(
    host: Host,
) -> None:
    plan = build_plan(2)
    await host.status()
    call = asyncio.create_task(host.prepare(plan))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await host.release(plan.lease_id)
    assert (await host.status()).leases == ()
    assert elements() == {}


async def test_calls_at_the_same_time_get_their_own_answers(host: Host) -> None:
    plans = [build_plan(n) for n in range(2, 8)]
    leases = await asyncio.gather(*(host.prepare(plan) for plan in plans))
    assert [lease.id for lease in leases] == [plan.lease_id for plan in plans]


async def test_log_is_private_and_has_the_operation(host: Host, tmp_path: Path) -> None:
    await host.prepare(build_plan(2), op_id="op-12ab34")
    log = tmp_path / "helper.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert json.loads(log.read_text().splitlines()[-1])["op_id"] == "op-12ab34"


async def test_ledger_directory_is_root_only(host: Host, tmp_path: Path) -> None:
    await host.status()
    assert stat.S_IMODE((tmp_path / "run" / "leases").stat().st_mode) == 0o700


async def test_without_privilege_no_lease_is_made_and_the_reason_is_said(tmp_path: Path) -> None:
    privilege = Privilege(kind="none", missing="sudo is not installed", hint="install it")
    host = await Host.open(ledger=tmp_path / "leases", privilege=privilege)
    with pytest.raises(BangerError, match="sudo is not installed") as caught:
        await host.prepare(build_plan(2))
    assert caught.value.hint == "install it"
    await host.aclose()


async def test_release_kills_a_vmm_that_was_launched_into_the_cgroup(
    host: Host, tmp_path: Path
) -> None:
    lease = await host.prepare(build_plan(2))
    if lease.cgroup is None:
        pytest.skip("needs a writable cgroup v2")
    ref = await launch_vmm(
        ["sleep", "600"], cwd=tmp_path, console=tmp_path / "console", cgroup=lease.cgroup
    )
    assert Path(lease.cgroup, "cgroup.procs").read_text() == f"{ref.pid}\n"
    await host.release(LeaseId(lease.id))
    # A cgroup is empty a moment before its last process has ended.
    async with asyncio.timeout(PATIENCE_S):
        assert await wait_exit(ref) == ExitStatus(signal="KILL")


async def test_kill_ends_everything_in_the_cgroup(host: Host, tmp_path: Path) -> None:
    lease = await host.prepare(build_plan(2))
    if lease.cgroup is None:
        pytest.skip("needs a writable cgroup v2")
    for name in ("go", "ready"):
        os.mkfifo(tmp_path / name)
    # A child in a session of its own, which no signal to the first process would reach.
    script = "read x < go; /usr/bin/setsid /bin/sh -c 'echo $$ > ready; exec /bin/sleep 600' & wait"
    ref = await launch_vmm(
        ["/bin/sh", "-c", script],
        cwd=tmp_path,
        console=tmp_path / "console",
        cgroup=lease.cgroup,
    )
    (tmp_path / "go").write_text("\n")
    pid = int((tmp_path / "ready").read_text())
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    child = ProcessRef(pid=pid, start_time=int(stat[19]))
    assert is_alive(child)
    await kill_vmm(ref, lease.cgroup)
    await host.release(lease.id)
    async with asyncio.timeout(PATIENCE_S):
        await wait_exit(child)


async def test_helper_is_found_beside_the_package() -> None:
    assert (find_helper() / "__main__.py").is_file()
