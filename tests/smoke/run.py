"""`python -m tests.smoke.run`: boot the nested host, run the scenarios in it, report each one.

The host's second serial port carries what happens inside: event lines that start with `@`, and the
log. Everything is written to `build/smoke/`; a scenario that fails has its part of the log printed.
The emulated host belongs to this call and ends with it.

Exit status: 0 all passed, 1 a scenario failed or the host did not get that far, 2 wrong usage,
77 the only selected scenario was skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tools.steps import BUILD, StepFailed, say

from tests.smoke import host_payload, nested_host
from tests.smoke.scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

OUTPUT = BUILD / "smoke"
# The default deadline of a whole run. It takes about a third of it on two cores.
_LIMIT_S = 1800


@dataclass
class Report:
    """What the event lines have told so far; lines before the first scenario are the preamble."""

    results: dict[str, str] = field(default_factory=dict)
    current: str | None = None
    _log: list[str] = field(default_factory=list)

    def feed(self, line: str) -> None:
        """Take one line of the host's output."""
        if line.startswith("@step "):
            _, uptime, what = line.split(maxsplit=2)
            say(f"smoke: {what} (at {float(uptime):.0f} s of the host)")
        elif line.startswith("@event "):
            self._event(json.loads(line.removeprefix("@event ")))
        else:
            self._log.append(line)

    def _event(self, event: dict[str, str | float]) -> None:
        if "start" in event:
            self.current = str(event["start"])
            self._log.clear()
            return
        name, result = str(event["end"]), str(event["result"])
        self.results[name] = result
        self.current = None
        print(f"{result.upper()} {name} ({event['seconds']} s)", flush=True)
        if result == "fail":
            self.dump(name)

    def dump(self, name: str) -> None:
        """Show and keep the log since the last event."""
        text = "".join(f"{line}\n" for line in self._log)
        (OUTPUT / f"{name}.log").write_text(text)
        print("".join(f"    {line}\n" for line in self._log), end="", flush=True)


def qemu_command(
    image: nested_host.HostImage, payload: Path, scratch: Path, names: list[str]
) -> list[str]:
    """The emulated host: one processor, because a second one was seen to hang."""
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg"),
        *("-cpu", "max"),
        *("-smp", "1"),
        *("-m", "4096"),
        *("-display", "none"),
        *("-monitor", "none"),
        *("-nic", "none"),
        "-no-reboot",
        *("-kernel", str(image.kernel)),
        *("-initrd", str(image.initrd)),
        "-append",
        "root=/dev/vda rootfstype=squashfs ro console=ttyS0 quiet mitigations=off "
        f"smoke.scenarios={','.join(names)}",
        *("-drive", f"file={image.root},format=raw,if=virtio,readonly=on"),
        *("-drive", f"file={scratch},format=raw,if=virtio,cache=unsafe,discard=unmap"),
        *("-drive", f"file={payload},format=raw,if=virtio,readonly=on"),
        *("-serial", f"file:{OUTPUT / 'console.log'}"),
        *("-serial", "stdio"),
    ]


@contextlib.contextmanager
def _running(command: list[str], limit_s: float) -> Iterator[Iterable[str]]:
    """The lines of the host's second serial port; the host ends with the block, or at the limit."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    deadline = threading.Timer(limit_s, process.kill)
    deadline.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            yield process.stdout
    finally:
        deadline.cancel()
        process.kill()
        process.wait()


def run(names: list[str], limit_s: float) -> int:
    """Build what is missing, boot, and report."""
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    if nested_host.find_image() is None:
        say("smoke: building the emulated host (once) …")
    image = nested_host.ensure_image(OUTPUT / "host-image.log")
    work = OUTPUT / "work"
    report = Report()
    try:
        say("smoke: packing what it is to test …")
        payload = host_payload.build_payload(work)
        scratch = work / "scratch.ext4"
        host_payload.make_scratch(scratch)
        command = qemu_command(image, payload, scratch, names)
        say(f"smoke: booting it ({time.monotonic() - started:.0f} s so far) …")
        with _running(command, limit_s) as lines, (OUTPUT / "host.log").open("w") as log:
            for line in lines:
                log.write(line)
                log.flush()
                report.feed(line.rstrip("\r\n"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _conclude(report, names, time.monotonic() - started)


def _conclude(report: Report, names: list[str], seconds: float) -> int:
    wanted = names or [scenario.name for scenario in SCENARIOS]
    missing = [name for name in wanted if name not in report.results]
    if missing:
        print(f"FAIL {missing[0]}: the host ended before it was done; its last words:", flush=True)
        report.dump(missing[0])
    results = list(report.results.values())
    counts = {word: results.count(word) for word in ("pass", "fail", "skip")}
    print(
        f"== smoke: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped, "
        f"{len(missing)} not run, in {seconds:.0f} s; logs in {OUTPUT} ==",
        flush=True,
    )
    if missing or counts["fail"]:
        return 1
    return 77 if results == ["skip"] else 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.smoke.run", description=__doc__)
    parser.add_argument("--list", action="store_true", help="names, classes and descriptions")
    parser.add_argument("--scenario", metavar="A[,B]", help="only these")
    parser.add_argument("--limit", type=float, default=_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--clean", action="store_true", help="forget the host's image and the logs")
    options = parser.parse_args()
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<20} {scenario.kind:<8} {scenario.description}")
        return 0
    if options.clean:
        shutil.rmtree(OUTPUT, ignore_errors=True)
        shutil.rmtree(nested_host.image_directory(), ignore_errors=True)
        return 0
    names = [name for name in (options.scenario or "").split(",") if name]
    known = {scenario.name for scenario in SCENARIOS}
    if unknown := [name for name in names if name not in known]:
        print(f"no such scenario: {', '.join(unknown)} (make smoke-list)", file=sys.stderr)
        return 2
    try:
        return run(names, options.limit)
    except (StepFailed, subprocess.CalledProcessError) as e:
        print(f"smoke: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
