"""`python -m tests.smoke.run`: boot nested hosts, run the scenarios in them, report each one.

Each host is emulated on one processor, so several go side by side; the scenarios are dealt to
whichever host asks next. Everything is written to `build/smoke/`; a scenario that fails has its
part of the log printed and kept. The hosts belong to this call and end with it.

Exit status: 0 all passed, 1 a scenario failed or a host did not get that far, 2 wrong usage,
77 the only selected scenario was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time

from tools.steps import BUILD, ROOT, StepFailed, say

from tests.smoke import host_payload, nested_host
from tests.smoke.machine import MEMORY_MIB, Machine, qemu_command
from tests.smoke.registry import Deal, Scenario, all_scenarios, choose
from tests.smoke.report import Report

OUTPUT = BUILD / "smoke"
FIGURES = ROOT / "bench" / "results"
# The default deadline of a whole run. It takes about a third of it on two processors.
_LIMIT_S = 1800
_MOST_JOBS = 8
# Hosts whose emulated processor stood still and that were replaced, in one run.
_MOST_FROZEN = 2


def default_jobs() -> int:
    """One host per processor that this process may use, at most eight, as far as memory goes."""
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_JOBS, memory_mib // MEMORY_MIB))


def run(scenarios: list[Scenario], jobs: int, limit_s: float) -> Report:
    """Build what is missing, boot as many hosts as there is work for, and wait for their end.

    Raises:
        StepFailed, subprocess.CalledProcessError: something could not be built.
    """
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    if nested_host.find_image() is None:
        say("smoke: building the emulated host (once) …")
    image = nested_host.ensure_image(OUTPUT / "host-image.log")
    work = OUTPUT / "work"
    report = Report(OUTPUT)
    machines: list[Machine] = []

    def boot(waiting: list[Scenario]) -> list[Machine]:
        deal = Deal(waiting)
        hosts = range(len(machines) + 1, len(machines) + 1 + min(jobs, len(deal)))
        say(f"smoke: booting {len(hosts)} (after {time.monotonic() - started:.0f} s) …")
        for number in hosts:
            scratch = work / f"scratch-{number}.ext4"
            host_payload.make_scratch(scratch)
            command = qemu_command(image, payload, scratch, OUTPUT / f"console-{number}.log")
            left_s = limit_s - (time.monotonic() - started)
            machines.append(Machine(number, command, deal, report, OUTPUT, left_s))
            machines[-1].start()
        return machines[-len(hosts) :]

    try:
        say("smoke: packing what it is to test …")
        payload = host_payload.build_payload(work)
        waiting = scenarios
        for _ in range(_MOST_FROZEN + 1):
            booted = boot(waiting)
            for machine in booted:
                machine.join()
            waiting = [each for each in waiting if each.name not in report.results]
            # Only what a host could not tell because it stood still is told by another one.
            if not waiting or not any(machine.frozen for machine in booted):
                break
    finally:
        for machine in machines:
            machine.stop()
            machine.join()
        shutil.rmtree(work, ignore_errors=True)
    return report


def keep_figures(report: Report) -> None:
    """Write what was measured beside the results of `make bench`."""
    if report.figures:
        FIGURES.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        path = FIGURES / f"{stamp}-host.json"
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        document = {
            "schema": 1,
            "time": stamp,
            "where": "nested host: QEMU, software emulation, one processor",
            "commit": commit,
            "load": os.getloadavg(),
            "figures": report.figures,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        say(f"smoke: figures in {path}")


def _list() -> None:
    for each in all_scenarios():
        kind = "measured" if each.measured else each.kind
        print(f"{each.name:<20} {kind:<8} {each.description}")


def _jobs(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= _MOST_JOBS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {_MOST_JOBS}")
    return int(text)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.smoke.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="names, classes and descriptions")
    parser.add_argument("--scenario", metavar="A[,B]", help="only these")
    parser.add_argument(
        "--jobs",
        type=_jobs,
        metavar="N",
        help=f"hosts side by side (default: one per processor, at most {_MOST_JOBS})",
    )
    parser.add_argument("--limit", type=float, default=_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--clean", action="store_true", help="forget the host's image and the logs")
    options = parser.parse_args()
    if options.list:
        _list()
        return 0
    if options.clean:
        shutil.rmtree(OUTPUT, ignore_errors=True)
        shutil.rmtree(nested_host.image_directory(), ignore_errors=True)
        return 0
    names = [name for name in (options.scenario or "").split(",") if name]
    if options.scenario is not None and not names:
        parser.error("--scenario names none (--list)")
    try:
        scenarios = choose(names)
    except KeyError as e:
        print(f"no such scenario: {e.args[0]} (make smoke-list)", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        report = run(scenarios, options.jobs or default_jobs(), options.limit)
    except (StepFailed, subprocess.CalledProcessError) as e:
        print(f"smoke: {e}", file=sys.stderr)
        return 1
    keep_figures(report)
    return report.conclude([each.name for each in scenarios], time.monotonic() - started)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
