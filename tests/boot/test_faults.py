"""Faults at the steps of real VMs: a few of the matrix, others every day.

The daemon is a process of its own, killed by `kill -9` at a step or standing still there while
another one is killed: the VMM, the root helper, the command line, the guest's agent. Afterwards the
host is as it was, what the guest had synced is there, and the next command works.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.faults import MOMENTS, STEPS
from banger.process import read_stat
from boot.installation import PATIENCE_S, SMALL, Installation
from sample import SEED_OF_THE_DAY, pick

NAME = "faulty"
# Only what every start passes: nothing is copied of a home that is not there.
_START = tuple(step for step in STEPS["start"] if step != "start.file_sync")
_VICTIMS = ("vmm", "helper", "client", "agent")


def daily(choices: tuple[str, ...], *where: str) -> str:
    return pick(choices, *where, seed=SEED_OF_THE_DAY)


def order_of(banger: Installation, steps: tuple[str, ...], action: str, *where: str) -> str:
    if banger.json("daemon", "status", "--json")["network"] == "user":
        steps = tuple(step for step in steps if not step.endswith(".lease"))
    return f"{daily(steps, *where, 'step')}:{daily(MOMENTS, *where, 'moment')}:{action}"


@contextlib.contextmanager
def daemon_with(banger: Installation, marks: Path, order: str) -> Iterator[Path]:
    """The next daemon has this order; the one after it has none. Gives the mark that it leaves."""
    print(f"BANGER_SEED={SEED_OF_THE_DAY}: {order}")
    banger.stop_daemon()
    banger.env["BANGER_FAULTS"] = f"{marks}:{order}"
    try:
        yield marks / order
    finally:
        del banger.env["BANGER_FAULTS"]
        # It may have been killed; then there is nobody to be stopped.
        banger.stop_daemon()


def wait_for(what: Callable[[], Any], doing: str, *, timeout_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"{doing}: not within {timeout_s:g} s"
        time.sleep(0.01)
    return found


def state_of(banger: Installation) -> str | None:
    """The VM's state as the next command sees it; None: there is no such VM."""
    rows = banger.json("vm", "list", "--json")
    return next((str(row["state"]) for row in rows if row["name"] == NAME), None)


def test_create_whose_daemon_is_killed_leaves_nothing(
    banger: Installation, nothing_left: None, tmp_path: Path
) -> None:
    order = order_of(banger, (*STEPS["create"], *_START), "kill", "create")
    with daemon_with(banger, tmp_path, order) as mark:
        done = banger("vm", "create", "--name", NAME, *SMALL)
        assert mark.exists(), f"{order} was not met\n{done.err}"
        assert done.status != 0
    # Killed when all was done, the VM is there, and is the user's.
    if order.startswith("start.publish:") and state_of(banger) is not None:
        assert state_of(banger) == "running"
        banger.ok("vm", "delete", NAME)
    assert state_of(banger) is None


@pytest.fixture
def faulty(banger: Installation, nothing_left: None) -> Iterator[str]:
    """A running VM in which something is written and synced."""
    banger.ok("vm", "create", "--name", NAME, *SMALL)
    banger.ok("vm", "exec", NAME, "--", "sh", "-c", "echo kept > /root/kept && sync")
    yield NAME
    if state_of(banger) is not None:
        banger.ok("vm", "delete", NAME)


def test_what_was_synced_survives_whoever_is_killed(
    banger: Installation, faulty: str, tmp_path: Path
) -> None:
    order = order_of(banger, (*STEPS["stop"], *STEPS["release"]), "kill", "stop")
    with daemon_with(banger, tmp_path, order) as mark:
        done = banger("vm", "stop", faulty)
        assert mark.exists(), f"{order} was not met\n{done.err}"
    banger.ok("vm", "stop", faulty)
    assert state_of(banger) == "stopped"

    start_while_somebody_is_killed(banger, tmp_path, daily(_VICTIMS, "victim"))
    if state_of(banger) != "running":
        banger.ok("vm", "start", faulty)
    assert banger.ok("vm", "exec", faulty, "--", "cat", "/root/kept").text == "kept\n"

    order = order_of(
        banger, (*STEPS["stop"], *STEPS["release"], *STEPS["delete"]), "kill", "delete"
    )
    with daemon_with(banger, tmp_path, order) as mark:
        done = banger("vm", "delete", faulty)
        assert mark.exists(), f"{order} was not met\n{done.err}"


def start_while_somebody_is_killed(banger: Installation, marks: Path, victim: str) -> None:
    """A start whose daemon stands still at a step, while another process is killed."""
    if victim == "agent":
        banger.ok("vm", "start", NAME)
        if not kill_agent(banger):
            return
        # Its VM is not taken for dead: its user stops it, without its guest's help.
        done = banger.ok("vm", "stop", NAME)
        assert "did not answer" in done.err
        return
    order = order_of(banger, _START, "stop", "start")
    with daemon_with(banger, marks, order) as mark:
        starting = banger.popen("vm", "start", NAME)
        wait_for(mark.exists, order)
        pid = daemon_pid(banger)
        try:
            wait_for(lambda: (read_stat(pid) or ("", 0))[0] == "T", "the daemon's standing still")
            kill_one(banger, victim, pid, starting)
        finally:
            # Whatever went wrong: nobody can end it in order while it stands still.
            os.kill(pid, signal.SIGCONT)
        starting.communicate(timeout=PATIENCE_S)


def daemon_pid(banger: Installation) -> int:
    """Without asking it: it stands still."""
    lock = banger.runtime / "daemon.lock"
    number = lock.stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        # Those who wait for a lock have an arrow before it (proc_locks(5)).
        if words[1] != "FLOCK" or int(words[5].split(":")[2]) != number:
            continue
        # Another filesystem's file may have the same number.
        if _has(words[4], lock):
            return int(words[4])
    raise AssertionError("no daemon runs")


def _has(pid: str, path: Path) -> bool:
    """Whether a process has this file open."""
    for fd in Path("/proc", pid, "fd").glob("*"):
        with contextlib.suppress(OSError):
            if fd.readlink() == path:
                return True
    return False


def kill_one(
    banger: Installation, victim: str, daemon: int, starting: subprocess.Popen[bytes]
) -> None:
    """`kill -9` of a process that is there; before its step there may be none."""
    if victim == "client":
        starting.kill()
        return
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            status = (entry / "stat").read_text()
            parent = int(status[status.rindex(")") + 2 :].split()[1])
            where = os.readlink(entry / "cwd")
            helper = parent == daemon and b"banger_root" in (entry / "cmdline").read_bytes()
            vmm = where.startswith(str(banger.runtime / "vms"))
            if (victim == "helper" and helper) or (victim == "vmm" and vmm):
                os.kill(int(entry.name), signal.SIGKILL)


def kill_agent(banger: Installation) -> bool:
    """From within, by its own command, which therefore never ends in order. False where it is the
    guest's process 1, which nobody there can kill."""
    look = "grep -l 'guest-servic[e]' /proc/[0-9]*/cmdline"
    found = banger("vm", "exec", NAME, "--", "sh", "-c", look).text.split()
    if not found:
        return False
    banger("vm", "exec", NAME, "--", "kill", "-9", *(Path(path).parent.name for path in found))
    wait_for(lambda: banger("vm", "health", NAME).status != 0, "the agent's end")
    return True
