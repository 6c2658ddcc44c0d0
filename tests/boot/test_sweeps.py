"""What a daemon does by itself for VMs that run, with a real guest: figures, clock, auto-stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.vmm import qmp
from boot.installation import PATIENCE_S, SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")
_DAEMON = Path(__file__).with_name("daemon_with_clock.py")


class OwnDaemon:
    """The installation's daemon as a process of ours, on a host that does what the test says."""

    def __init__(self, banger: Installation, orders: Path) -> None:
        self._banger = banger
        self._orders = orders
        banger.stop_daemon()
        self._config = banger.config.read_text()
        # Longer than any other VM of the installation goes unused meanwhile.
        banger.config.write_text(
            self._config + 'auto_stop_stale_after = "24h"\nstats_poll_interval = "1s"\n'
        )
        ready, told = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(_DAEMON), str(orders), "--ready-fd", str(told)],
            env=banger.env, pass_fds=(told,), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(told)
        with os.fdopen(ready, "rb") as f:
            assert f.read(1) == b"1"
        assert banger.daemon_pid() == self.process.pid

    def order(self, name: str, value: float | None) -> None:
        """`slept`: the host has slept for so many seconds. `free`: so many bytes are free."""
        path = self._orders / name
        if value is None:
            path.unlink()
            return
        staging = path.with_suffix(".new")
        staging.write_text(str(value))
        staging.rename(path)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0
        self._banger.config.write_text(self._config)


@pytest.fixture
def daemon(banger: Installation, tmp_path: Path) -> Iterator[OwnDaemon]:
    daemon = OwnDaemon(banger, tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture
def vm(banger: Installation, daemon: OwnDaemon) -> Iterator[str]:
    banger.ok("vm", "create", "--name", "watched", *SMALL)
    yield "watched"
    banger("vm", "delete", "watched")


def guest_time(banger: Installation, vm: str) -> float:
    return float(banger.ok("vm", "exec", vm, "--", "date", "+%s.%N").text)


def seconds_behind(banger: Installation, vm: str) -> tuple[float, float]:
    """By how much the guest's clock is behind: at least, and at most. Asking takes its time."""
    before = time.time()
    there = guest_time(banger, vm)
    return before - there, time.time() - there


def one_stats(banger: Installation, vm: str) -> Any:
    (stats,) = banger.json("vm", "stats", vm)
    return stats


def wait_until(banger: Installation, vm: str, wanted: Any) -> Any:
    """The record of the VM, once it is as wanted."""
    end = time.monotonic() + PATIENCE_S
    while not wanted(record := banger.show(vm)):
        assert time.monotonic() < end, json.dumps(record) + banger.evidence()
    return record


def test_guests_are_looked_after_by_their_daemon(
    banger: Installation, daemon: OwnDaemon, vm: str
) -> None:
    # A busy guest shows: its processor, and what it receives.
    before = one_stats(banger, vm)
    data = os.urandom(3_000_000)
    script = "cat > /root/data; sync; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"
    banger.ok("vm", "exec", vm, "--", "sh", "-c", script, stdin=data)
    after = one_stats(banger, vm)
    assert after["vmm_cpu_s"] - before["vmm_cpu_s"] > 0.5
    assert after["work_allocated_bytes"] - before["work_allocated_bytes"] >= 3_000_000
    assert after["tasks"] >= 1
    assert {f["path"] for f in after["guest"]["filesystems"]} >= {"/", "/root"}
    assert after["guest"]["memory"]["available_bytes"] < after["guest"]["memory"]["total_bytes"]
    if banger.show(vm)["network"] == "bridge":
        assert after["network_received_bytes"] - before["network_received_bytes"] > 3_000_000
        assert after["network_sent_bytes"] > before["network_sent_bytes"]
    # The daemon collects by itself, too.
    with banger.popen("vm", "exec", vm, "--", "sh", "-c", "while :; do :; done") as busy:
        wait_until(banger, vm, lambda r: (r["stats"]["cpu_percent"] or 0) > 10)
        busy.send_signal(signal.SIGTERM)

    # A clock that went wrong while the host slept is right before the next command runs.
    banger.ok("vm", "exec", vm, "--", "date", "-s", "2001-02-03 04:05:06")
    assert guest_time(banger, vm) < 1e9
    daemon.order("slept", 8000)
    least, most = seconds_behind(banger, vm)
    # It was told within this very request, and a clock that is a second off is left alone.
    assert least < 2 and most > -2

    # On a full disk its processors stand still until there is room, and nobody hangs meanwhile.
    daemon.order("free", 1000)
    paused = wait_until(banger, vm, lambda r: r["paused"] is not None)
    stood = time.time()
    assert paused["state"] == "running"
    assert not runs(banger, vm)
    listed = banger.ok("vm", "list")
    assert "running (paused)" in listed.text
    assert "less than the 2G that are kept in reserve" in listed.err
    done = banger("vm", "exec", vm, "--", "true")
    assert (done.status, f"VM {vm} is paused: " in done.err) == (1, True), done.err
    while (stood_s := time.time() - stood) < 3:
        assert not runs(banger, vm)
    daemon.order("free", None)
    wait_until(banger, vm, lambda r: r["paused"] is None)
    assert runs(banger, vm)
    # Had nobody told it, its clock would be behind by all the time that it stood still.
    least, most = seconds_behind(banger, vm)
    assert least < stood_s / 2 and most > -2, (stood_s, least, most)

    # Used by a session, it is not stopped, however long nobody asked for it; then it is.
    banger.ok("vm", "session", "start", "--name", "work", vm, "--", "sleep", "1000")
    old = "2001-02-03T04:05:06.000Z"
    touched(banger, vm, old)
    assert wait_until(banger, vm, lambda r: r["touched_at"] > old)["state"] == "running"
    banger.ok("vm", "session", "kill", vm, "work")

    def stopped(record: Any) -> bool:
        if record["state"] == "running" and record["touched_at"] > old:
            touched(banger, vm, old)  # the daemon wrote the row at the same moment
        # Shown as stopped at once; why, when what it held has been given back.
        return bool(record["state"] == "stopped" and record["last_error"])

    record = wait_until(banger, vm, stopped)
    assert record["last_error"] == "nobody used it for 24h (auto_stop_stale_after)"
    done = banger("vm", "exec", vm, "--", "true")
    assert "nobody used it for 24h" in done.err
    assert f"hint: banger vm start {vm}" in done.err


def runs(banger: Installation, vm: str) -> bool:
    """What the VMM itself says of its processors."""
    record = banger.show(vm)
    assert record["vmm"] == "qemu", "how another VMM is asked is not known here"
    socket = banger.runtime / "vms" / record["id"][:12] / "api.sock"
    return bool(asyncio.run(qmp.execute(socket, "query-status"))["running"])


def touched(banger: Installation, vm: str, when: str) -> None:
    """Say in the row that it was last used then, as time alone would."""
    import sqlite3

    connection = sqlite3.connect(banger.state / "banger.db", timeout=30)
    with connection:
        connection.execute(
            "UPDATE vms SET record = json_set(record, '$.touched_at', ?) WHERE name = ?", (when, vm)
        )
    connection.close()
