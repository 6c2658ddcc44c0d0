"""The bench: measures, prints a table, keeps the figures in bench/results.

    .venv/bin/python tests/bench/run.py [FIGURE…]      figures: run exec cat import workspace
                                                       large bounded cli dns kernel oci memory
    BENCH_RUNS=20 make bench                           more than the ten runs of each side

Ends with status 0 whatever the figures are: a missed aim is a finding, not a failure.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.bench import (  # noqa: E402 - needs the path
    big_tree,
    bounded,
    dns,
    import_tree,
    in_guest,
    kernels,
    oci_import,
    on_host,
    report,
    workspace,
)
from tests.bench.ground import ROOT, Ground  # noqa: E402
from tests.bench.measure import Figure  # noqa: E402

_VM = "bench"
_RUNS = 10
_WITH_VM: dict[str, Callable[[Ground, str, int], list[Figure]]] = {
    "exec": in_guest.exec_true,
    "cat": in_guest.read_file,
    "import": import_tree.import_repository,
    "workspace": workspace.bring_in_and_back,
}
_WITHOUT: dict[str, Callable[[Ground, int], list[Figure]]] = {
    "cli": on_host.command_line,
    "dns": lambda _, runs: dns.name_server(runs),
    "oci": oci_import.figures,
    "run": in_guest.run_true,
    "kernel": kernels.boot,
    "memory": on_host.memory,
    "large": big_tree.large_repository,
    "bounded": bounded.bounded_memory,
}
_ORDER = (
    "run", "exec", "cat", "import", "workspace", "large", "bounded", "cli", "dns", "kernel", "oci",
    "memory",
)  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or list(_ORDER)
    if unknown := set(wanted) - set(_ORDER):
        sys.exit(f"unknown figure {', '.join(sorted(unknown))}: one of {' '.join(_ORDER)}")
    runs = int(os.environ.get("BENCH_RUNS", _RUNS))
    with tempfile.TemporaryDirectory(prefix="bb-") as directory:
        ground = Ground(Path(directory))
        try:
            report.say("bench: kernel and image")
            ground.furnish()
            # Before the measuring, so that the commit is the one that is measured.
            facts = report.machine_facts(ROOT, ground.json("daemon", "status", "--json"))
            figures = _measure(ground, wanted, runs)
        finally:
            ground.close()
    kept = report.write(ROOT / "bench" / "results", facts, figures, runs)
    sys.stdout.write(report.table(figures) + "\n")
    report.say(f"bench: kept in {kept.relative_to(ROOT)}")


def _measure(ground: Ground, wanted: list[str], runs: int) -> list[Figure]:
    figures: list[Figure] = []
    for name in (n for n in _ORDER if n in wanted and n in _WITHOUT and n != "memory"):
        report.say(f"bench: {name}")
        figures += _WITHOUT[name](ground, runs)
    if any(n in _WITH_VM for n in wanted):
        ground.create(_VM)
        for name in (n for n in _ORDER if n in wanted and n in _WITH_VM):
            report.say(f"bench: {name}")
            figures += _WITH_VM[name](ground, _VM, runs)
        ground.ok("vm", "delete", _VM)
    if "memory" in wanted:
        report.say("bench: memory")
        figures += _WITHOUT["memory"](ground, runs)
    return figures


if __name__ == "__main__":
    main()
