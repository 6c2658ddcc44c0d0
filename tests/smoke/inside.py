"""The loop in the nested host: asks for scenarios, runs them as root, reports each as an event.

A scenario leaves the host as it found it: one that does not, fails. Standard library only, against
the installed banger.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.smoke import events, guests
from tests.smoke.calls import banger, expect, host
from tests.smoke.census import STATE, dns_address, take_census
from tests.smoke.events import emit
from tests.smoke.registry import Scenario, Skipped, choose

MARKER = Path("/etc/banger/smoke-host")
# What ends asynchronously (a scope, a socket's last reference) has this long to be gone.
_SETTLE_S = 180


def main() -> int:
    """Ask for work on the second serial port until there is none."""
    if not MARKER.is_file():
        print(f"this host has no {MARKER}: the scenarios change what they run on", file=sys.stderr)
        return 2
    before = take_census()
    with Path("/dev/ttyS1").open() as port:
        while True:
            emit(want=True)
            # Empty lines only keep an emulated host awake.
            names = next(words for line in port if (words := line.split()))
            if names == ["end"]:
                return 0
            if names[0] == "again":
                events.before_the_cut, names = int(names[1]), names[2:]
            for each in choose(names):
                before = _report(each, before)


def _report(scenario: Scenario, before: Counter[str]) -> Counter[str]:
    """Run one scenario between its two events; return the census that the next one starts from."""
    emit(start=scenario.name)
    started = time.monotonic()
    result = _run(scenario, before)
    emit(end=scenario.name, result=result, seconds=round(time.monotonic() - started, 1))
    failed = result in ("fail", "frozen")
    return take_census() - guests.held_by_shared() if failed else before


def _run(scenario: Scenario, before: Counter[str]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    sizes = {path: path.stat().st_size for path in STATE.glob("*.log")}
    try:
        if scenario.kind == "global":
            guests.drop_shared()
        scenario.run()
        if not scenario.final:
            _expect_nothing_left(before)
    except Skipped as e:
        print(f"skipped: {e}")
        return "skip"
    except Exception:
        traceback.print_exc(file=sys.stdout)
        still = guests.find_standing_still()
        _show_evidence(since, sizes)
        _delete_all()
        if still:
            print(f"stood still in its kernel, before a line of ours: {', '.join(still)}")
            return "frozen"
        return "fail"
    return "pass"


def _expect_nothing_left(before: Counter[str]) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while left := take_census() - before - guests.held_by_shared():
        expect(time.monotonic() < deadline, "left on the host: " + "; ".join(sorted(left)))
        time.sleep(0.5)
    for name in guests.used_names:
        expect(dns_address(name) is None, f"the name server still knows {name}.vm")
    guests.used_names.clear()


def _show_evidence(since: str, sizes: dict[Path, int]) -> None:
    """Print what the services logged since the scenario began, and the end of every console."""
    units = ["-u", "bangerd.service", "-u", "bangerd-root.service"]
    try:
        print(host("journalctl", "-q", "-o", "cat", "--since", since, *units), flush=True)
    except AssertionError as e:
        print(e)
    for path in (*STATE.glob("*.log"), *STATE.glob("vms/*/console.log")):
        text = path.read_bytes()[sizes.get(path, 0) :].decode(errors="replace")
        print(f"--- {path}\n{text[-4000:]}", flush=True)


def _delete_all() -> None:
    """Remove what the failed scenario left, so that the next one is judged by itself."""
    try:
        for name in banger.vm_names():
            banger("vm", "delete", name)
        guests.forget_shared()
        guests.used_names.clear()
    except (OSError, AssertionError) as e:
        print(f"cleaning up after the failure: {e}")


if __name__ == "__main__":
    sys.exit(main())
