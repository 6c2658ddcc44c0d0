"""What is kept of a run of the bench, and what is printed of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.measure import Figure


def machine_facts(root: Path, status: dict[str, Any]) -> dict[str, Any]:
    """The machine that the figures are of; `status` is what `daemon status --json` says."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    vmm = status["vmm"]
    return {
        "cpu": cpu,
        "processors": os.cpu_count(),
        "memory_mib": int(memory) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "driver": vmm["driver"],
        "accel": vmm["accel"] if vmm["driver"] == "qemu" else "kvm",
        "network": status["network"],
        "version": status["version"],
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain", "--", "src", "agent")),
    }


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(directory: Path, facts: dict[str, Any], figures: list[Figure], runs: int) -> Path:
    """Keep a run as `<UTC date and time>.json`."""
    now = datetime.now(UTC)
    document = {
        "schema": 1,
        "time": now.isoformat(timespec="seconds"),
        "runs": runs,
        "machine": facts,
        "figures": [f.document() for f in figures],
    }
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{now:%Y-%m-%dT%H%M%SZ}.json"
    beside = target.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(target)
    return target


def table(figures: list[Figure]) -> str:
    """A table in Markdown, which is also readable as it is."""
    rows = [("figure", "against", "banger", "other", "value", "pairs", "aim", "")]
    for f in figures:
        sign = "≥" if f.throughput else "≤"
        if f.theirs:
            pairs = sorted(f.pair_ratios())
            rows.append(
                (
                    f.title,
                    f.against,
                    _time(f.ours),
                    _time(f.theirs),
                    f"{f.value:.2f}",
                    f"{pairs[0]:.2f} to {pairs[-1]:.2f}",
                    f"{sign} {f.aim:g}",
                    _word(f),
                )
            )
        else:
            rows.append(
                (
                    f.title,
                    "",
                    f"{f.value:.2f} {f.unit}",
                    "",
                    f"{f.value:.2f} {f.unit}",
                    "",
                    f"{sign} {f.aim:g} {f.unit}",
                    _word(f),
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _time(runs: list[float]) -> str:
    median = statistics.median(runs)
    return f"{median * 1000:.0f} ms" if median < 10 else f"{median:.1f} s"


def _word(figure: Figure) -> str:
    return "met" if figure.met else "missed"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
