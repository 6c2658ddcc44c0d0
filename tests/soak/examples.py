"""A run that nobody measured, for the tests of what is made of one."""

from __future__ import annotations

from tests.soak.lines import LINES
from tests.soak.report import Run


def make_run(samples: int = 40) -> Run:
    """Every line flat but the daemon's descriptors, which leak one a cycle."""
    facts = {
        "driver": "qemu", "accel": "tcg", "processors": 2, "cpu": "a CPU", "kernel": "6.1",
        "python": "3.11", "commit": "0123456789abcdef",
    }  # fmt: skip
    run = Run(facts=facts, began="2026-01-01T00:00:00+00:00")
    for i in range(samples):
        sample = {line.name: 100.0 for line in LINES}
        sample["daemon_fds"] = 20.0 + i
        run.samples.append({"time_s": 90.0 * i, **sample})
    return run
