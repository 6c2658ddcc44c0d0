"""Figures of the installed host side, taken in the nested host; run by name (`make bench-host`).

Emulated, so only ratios and counts mean something: the helper's share of a start, a tap from the
pool against one that is made, the name server against dnsmasq, and what grows over many VMs.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.smoke import guests
from tests.smoke.calls import banger, expect, host, main_pid
from tests.smoke.census import HELPER_RUNTIME, RUNTIME, STATE, take_census
from tests.smoke.events import emit
from tests.smoke.registry import scenario

_CYCLES = 20
_PREPARES = 15
_DNS_QUERIES, _DNS_RUNS = 2000, 5
_HELPER_SOCKET = HELPER_RUNTIME / "bangerd-root.sock"
_BRIDGE = {"name": "br-fc", "address": "172.16.0.1", "prefix": 24}


@scenario("global", "twenty VMs in a row: the helper's share of a start, and that nothing grows",
          measured=True)  # fmt: skip
def figures_vms() -> None:
    _cycle(0)  # What is made once and kept: bridge, tables, blank disks.
    _cycle(1)
    before, began = _holdings(), time.strftime("%Y-%m-%d %H:%M:%S")
    starts = [_cycle(2 + number) for number in range(_CYCLES)]
    after = _holdings()
    shares = _helper_times(began)
    medians = {method: statistics.median(times[method] for times in shares) for method in shares[0]}
    start_ms = statistics.median(starts) * 1000
    growth = {name: after[name] - before[name] for name in before}
    emit(
        figures={
            "vms_in_a_row": _CYCLES,
            "create_ms": {"median": round(start_ms), "runs": [round(s * 1000) for s in starts]},
            "helper_ms": {**medians, "runs": shares},
            "helper_share_of_start": round(sum(medians.values()) / start_ms, 4),
            "holdings_before": before,
            "growth": growth,
        }
    )
    # Memory comes in pages, and a few of an interpreter's may be touched for the first time.
    allowed = {"helper_rss_kib": 256}
    kept = {name: n for name, n in growth.items() if n > allowed.get(name, 0)}
    expect(not kept, f"grown over {_CYCLES} VMs: {kept}")


def _cycle(number: int) -> float:
    """Create and delete one VM; the seconds that create took."""
    began = time.monotonic()
    guests.create(f"cycle-{number}")
    took = time.monotonic() - began
    banger("vm", "delete", f"cycle-{number}")
    return took


def _holdings() -> dict[str, int]:
    """How much of everything there is on the host."""
    census = take_census()
    helper = main_pid("bangerd-root.service")
    status = Path(f"/proc/{helper}/status").read_text()
    kinds = Counter(line.split()[0] for line in census.elements())
    return {
        "interfaces": len(list(Path("/sys/class/net").iterdir())),
        "cgroups": sum(1 for _ in Path("/sys/fs/cgroup").rglob("cgroup.procs")),
        "nft_elements": kinds["element"],
        "files": sum(
            1 for root in (STATE, RUNTIME, HELPER_RUNTIME, Path("/var/lib/banger-root"))
            for _ in root.rglob("*")
        ),
        "helper_rss_kib": int(status.partition("VmRSS:")[2].split()[0]),
        "helper_descriptors": len(os.listdir(f"/proc/{helper}/fd")),
        "daemon_descriptors": len(os.listdir(f"/proc/{main_pid('bangerd.service')}/fd")),
    }  # fmt: skip


def _helper_times(since: str) -> list[dict[str, float]]:
    """Milliseconds of prepare, launch and release, a VM each, from the helper's own log."""
    journal = host("journalctl", "-q", "-o", "cat", "-u", "bangerd-root", "--since", since)
    leases: dict[str, dict[str, float]] = {}
    for line in journal.splitlines():
        call = json.loads(line) if line.startswith("{") else {}
        if call.get("method") in ("prepare", "launch", "release") and call["result"] == "ok":
            times = leases.setdefault(call["lease"], {"prepare": 0, "launch": 0, "release": 0})
            times[call["method"]] += call["duration_ms"]
    complete = [times for times in leases.values() if times["prepare"] and times["launch"]]
    expect(len(complete) >= _CYCLES, f"the helper's log has {len(complete)} whole VMs")
    return complete[-_CYCLES:]


@scenario("global", "a lease whose tap is from the pool, against one whose tap is made",
          measured=True)  # fmt: skip
def figures_pool() -> None:
    hit, missed = [], []
    for _ in range(_PREPARES):
        _ask("sweep", {"pool": {"bridge": _BRIDGE, "size": 4}})
        hit.append(_lease(pooled=True))
        _ask("sweep", {"pool": {"bridge": _BRIDGE, "size": 0}})
        missed.append(_lease(pooled=False))
    _ask("sweep", {"pool": {"bridge": _BRIDGE, "size": 4}})
    ratio = statistics.median(hit) / statistics.median(missed)
    emit(
        figures={
            "lease_from_pool_ms": {"median": round(statistics.median(hit), 1), "runs": hit},
            "lease_without_pool_ms": {"median": round(statistics.median(missed), 1),
                                      "runs": missed},
            "lease_pool_ratio": round(ratio, 3),
        }
    )  # fmt: skip


def _lease(*, pooled: bool) -> float:
    """Prepare and release one lease; the milliseconds that both took."""
    vm_id = os.urandom(16).hex()
    plan = {
        "vm_id": vm_id,
        "bridge": _BRIDGE,
        "guest": {"address": "172.16.0.250", "mac": "06:00:ac:10:00:fa"},
        "isolate": True,
        "announce_port": 7001,
        "nat": False,
        "guest_host_ports": [],
        "limits": {"vcpu": 1, "memory_mib": 384},
        "jail": True,
    }
    began = time.monotonic()
    lease = _ask("prepare", plan)
    _ask("release", {"id": vm_id})
    took = (time.monotonic() - began) * 1000
    expect(lease["tap"].startswith("tap-pool-") == pooled, f"the lease's tap is {lease['tap']}")
    return round(took, 2)


def _ask(method: str, params: dict[str, Any]) -> Any:
    """One call of the helper, as root, whom it serves too."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(_HELPER_SOCKET))
        request = {"version": 1, "method": method, "params": params, "op_id": "op-f19b0e"}
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as answer:
            reply = json.loads(answer.readline())
    expect("result" in reply, f"{method}: {reply}")
    return reply["result"]


@scenario("global", "answers per second and latency of the name server, against dnsmasq",
          measured=True)  # fmt: skip
def figures_dns() -> None:
    script = (
        "import json; from tests.bench.dns import name_server; "
        f"print(json.dumps([f.document() for f in name_server({_DNS_RUNS}, {_DNS_QUERIES})]))"
    )
    done = banger.run(
        "/home/dev/.venv/bin/python", "-c", script,
        env={**banger.environment, "PYTHONPATH": "/payload"},
    )  # fmt: skip
    expect(done.status == 0, f"the measurement ended with status {done.status}: {done.err}")
    emit(figures={"dns": json.loads(done.out)})
