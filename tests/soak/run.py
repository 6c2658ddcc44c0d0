"""`make soak`: property tests with new examples, then cycles of VMs for an hour, then a judgement.

    SOAK_MINUTES=60 make soak
    .venv/bin/python -m tests.soak.run [--minutes N] [--only properties|cycles]

Ends with status 0 when everything worked and no line grows. Ctrl-C lets the cycle end that has been
begun and judges what was measured; a second one stops at once. Samples and pictures are kept in
build/soak/; those of half an hour or more also go into bench/results and docs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.report import machine_facts
from tests.soak import report
from tests.soak.cycle import Cycle, make_repository
from tests.soak.ground import Ground
from tests.soak.report import Run

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
_DOCUMENT = ROOT / "docs" / "reliability.md"
_PUBLISHED_MINUTES = 30.0
_MOST_FAILURES = 3
# How many times the usual number of examples; see tests/conftest.py.
_EXAMPLES = "3"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make soak", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", choices=("properties", "cycles"))
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        # Not to be noticed when an hour has been measured.
        say("the pictures need matplotlib, which `make soak` installs")
        return 2
    passed = True
    if options.only != "cycles":
        passed = run_properties()
    if options.only == "properties":
        return 0 if passed else 1
    run = run_cycles(options.minutes)
    return 0 if _conclude(run) and passed else 1


def say(line: str) -> None:
    print(f"soak: {line}", file=sys.stderr, flush=True)


def run_properties() -> bool:
    say(f"property tests with new examples (BANGER_SOAK={_EXAMPLES}), and one of the pictures")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/property", "tests/soak"],
        cwd=ROOT, env={**os.environ, "BANGER_SOAK": _EXAMPLES}, check=False,
    )  # fmt: skip
    return done.returncode == 0


class _Interrupt:
    """Set by the first Ctrl-C or TERM; the second one is as usual."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("ending after this cycle; once more: at once")


def run_cycles(minutes: float) -> Run:
    """Cycles until the time is over, somebody interrupts, or too many fail."""
    interrupt = _Interrupt()
    number = os.getpid() % 200
    # Short, as socket paths are.
    root = Path(tempfile.mkdtemp(prefix="bk-"))
    ground = Ground(root, bridge=f"br-fc-k{number}", address=f"10.214.{number}.1")
    ground.configure()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(facts={}, began=began)
    try:
        say("kernel and image")
        ground.furnish()
        run.facts = machine_facts(ROOT, ground.status())
        ground.start_keeper()
        cycle = Cycle(ground, make_repository(root / "project"))
        start = time.monotonic()
        while not interrupt.asked and time.monotonic() - start < minutes * 60:
            try:
                cycle.run(len(run.samples) + 1)
                sample = ground.sample()
            except (AssertionError, subprocess.CalledProcessError) as e:
                run.failures.append(f"{e}\n{ground.evidence()}")
                say(f"cycle {len(run.samples) + 1} FAILED: {str(e).splitlines()[0]}")
                if len(run.failures) >= _MOST_FAILURES:
                    say(f"{_MOST_FAILURES} cycles have failed: giving up")
                    break
                cycle.clear()
                continue
            now_s = round(time.monotonic() - start, 1)
            run.samples.append({"time_s": now_s, **sample, **cycle.latencies})
            say(_progress(run, minutes))
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        ground.end()
    return run


def _progress(run: Run, minutes: float) -> str:
    last = run.samples[-1]
    verbs = ", ".join(
        f"{verb} {last[f'{verb}_ms'] / 1000:.1f}" for verb in ("create", "stop", "start", "delete")
    )
    return (
        f"{last['time_s'] / 60:5.1f} of {minutes:g} min, cycle {len(run.samples)}: {verbs} s; "
        f"daemon {last['daemon_rss_kib'] / 1024:.1f} MiB, {last['daemon_fds']:.0f} descriptors"
    )


def _conclude(run: Run) -> bool:
    """Keep, draw and judge; whether all is well."""
    stamp = run.began.replace(":", "").removesuffix("+0000")
    directory = ROOT / "build" / "soak" / stamp
    directory.mkdir(parents=True, exist_ok=True)
    if run.failures:
        (directory / "failures.txt").write_text("\n\n".join(run.failures))
    if not run.samples:
        say(f"nothing was measured; {len(run.failures)} failures in {directory}")
        return False
    table = report.write_csv(run, directory / f"{stamp}Z-soak.csv")
    print(report.build_table(run), flush=True)
    from tests.soak import plot

    pictures = plot.draw(run, directory)
    say(f"{run.headline}; kept in {directory.relative_to(ROOT)}")
    if run.minutes >= _PUBLISHED_MINUTES:
        shutil.copy(table, ROOT / "bench" / "results")
        for picture in pictures:
            shutil.copy(picture, ROOT / "docs")
        section = report.build_section(run, table.name)
        _DOCUMENT.write_text(report.replace_section(_DOCUMENT.read_text(), section))
        say("published in docs and bench/results")
    else:
        say(f"not published: that takes {_PUBLISHED_MINUTES:g} minutes")
    if run.grown:
        say(f"GROWS: {', '.join(run.grown)}")
    if run.failures:
        say(f"FAILED: {len(run.failures)} cycles, see {directory / 'failures.txt'}")
    return not run.grown and not run.failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
