"""Figures that need no guest: how quickly the command line answers, and what the daemon weighs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.bench.ground import PYTHON, Ground
from tests.bench.measure import Figure, alternate, load, timed

_VMS = 4
_MB = 1_000_000


def command_line(ground: Ground, runs: int) -> list[Figure]:
    """`--version` and `vm list --json` against the interpreter that does nothing."""
    ground.ok("vm", "list")  # the daemon is up
    figures = []
    for key, words, aim in (
        ("version", ("--version",), 5.0),
        ("list", ("vm", "list", "--json"), 7.0),
    ):
        before = load()
        # Short runs: more of them cost nothing and say more.
        ours, theirs = alternate(
            3 * runs,
            lambda words=words: ground.time(*words),  # type: ignore[misc]  # bound at once
            lambda: timed([str(PYTHON), "-c", "pass"]),
        )
        figures.append(
            Figure(
                key=key,
                title="banger " + " ".join(words),
                against="python3 -c pass",
                unit="s",
                aim=aim,
                ours=ours,
                theirs=theirs,
                load=before,
            )
        )
    return figures


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB (proc_pid_statm(5), second field: pages)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MB


def memory(ground: Ground, runs: int) -> list[Figure]:
    """The daemon's resident memory: fresh, after work, and for each of some running VMs.

    A daemon that has served its first VM has loaded all its code: what a VM costs is counted from
    there.
    """
    before = load()
    ground.ok("daemon", "stop")
    ground.ok("vm", "list")
    pid = ground.daemon_pid()
    fresh = resident_mb(pid)
    ground.create("first")
    ground.ok("vm", "exec", "first", "--", "true")
    per_vm: list[float] = []
    base = resident_mb(pid)
    last = base
    for number in range(_VMS):
        ground.create(f"m{number}")
        ground.ok("vm", "exec", f"m{number}", "--", "true")
        now = resident_mb(pid)
        per_vm.append(now - last)
        last = now
    ground.ok("vm", "delete", "first", *(f"m{n}" for n in range(_VMS)), timeout_s=600)
    idle = resident_mb(pid)
    mean = (last - base) / _VMS
    return [
        Figure(
            key="idle",
            title="daemon, idle after work",
            unit="MB",
            aim=60,
            ours=[idle],
            load=before,
            parts={"fresh_mb": fresh},
        ),
        Figure(
            key="per_vm",
            title=f"daemon, per running VM (mean of {_VMS})",
            unit="MB",
            aim=2,
            ours=[mean],
            load=before,
            parts={f"vm_{i}_mb": x for i, x in enumerate(per_vm)},
        ),
    ]
