"""What the hosts of a run have told: a line for each scenario, and the logs of those that failed.

One report per run, fed by one thread per host. A host's output carries event lines, which start
with `@`; the rest is the log of the scenario that runs there.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

from tools.steps import say


class Report:
    """The joined results of all hosts; every method may be called from any thread."""

    def __init__(self, output: Path) -> None:
        self.results: dict[str, str] = {}
        self.figures: dict[str, Any] = {}
        self._output = output
        self._lock = threading.Lock()

    def passed_or_failed(self, name: str, result: str, seconds: float, log: list[str]) -> None:
        """Note and print one result; a failed scenario's log is kept and shown."""
        with self._lock:
            self.results[name] = result
            print(f"{result.upper()} {name} ({seconds:g} s)", flush=True)
            if result == "fail":
                self._dump(name, log)

    def lost(self, name: str, log: list[str]) -> None:
        """A host ended in the midst of a scenario; before its first one, `name` is the host."""
        with self._lock:
            print(f"FAIL {name}: the host ended before it was done; its last words:", flush=True)
            self._dump(name, log)

    def stood_still(self, name: str, log: list[str]) -> None:
        """The processor of a scenario's guest stood still, which says nothing of what is tested."""
        with self._lock:
            print(f"FROZEN {name}: the processor of its guest stood still", flush=True)
            self._dump(name, log)

    def measured(self, figures: dict[str, Any]) -> None:
        """Take figures that a scenario has measured."""
        with self._lock:
            self.figures.update(figures)

    def _dump(self, name: str, log: list[str]) -> None:
        (self._output / f"{name}.log").write_text("".join(f"{line}\n" for line in log))
        print("".join(f"    {line}\n" for line in log), end="", flush=True)

    def conclude(self, wanted: list[str], seconds: float) -> int:
        """Print the summary and return the runner's exit status."""
        missing = [name for name in wanted if name not in self.results]
        results = list(self.results.values())
        counts = {word: results.count(word) for word in ("pass", "fail", "skip")}
        if missing:
            print(f"not run: {', '.join(missing)}")
        print(
            f"== smoke: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} "
            f"skipped, {len(missing)} not run, in {seconds:.0f} s; logs in {self._output} ==",
            flush=True,
        )
        if missing or counts["fail"]:
            return 1
        return 77 if results == ["skip"] else 0


class HostLog:
    """The output of one host, line by line, on its way into the report."""

    def __init__(self, report: Report, number: int) -> None:
        self._report = report
        self._number = number
        self._log: list[str] = []
        self.running: str | None = None
        """The scenario that has started and not ended."""
        self.told = 0
        """The last number of a scenario that wants the power cut."""
        self.stood_still = False
        """So did the processor of a guest in it, and its scenario is to be told by another host."""

    def feed(self, line: str) -> Literal["want", "cut"] | None:
        """Take one line; what it asks for, if anything: work, or to cut the power."""
        if line.startswith("@step "):
            _, uptime, what = line.split(maxsplit=2)
            say(f"smoke: host {self._number}: {what} (at {float(uptime):.0f} s of the host)")
        elif line.startswith("@event "):
            return self._event(json.loads(line.removeprefix("@event ")))
        else:
            self._log.append(line)
        return None

    def _event(self, event: dict[str, Any]) -> Literal["want", "cut"] | None:
        if "start" in event:
            if self.running != event["start"]:  # else it goes on after the power was cut
                self._log.clear()
            self.running = str(event["start"])
        elif "end" in event:
            self.running = None
            self._end(str(event["end"]), str(event["result"]), event["seconds"])
            self._log.clear()
        elif "figures" in event:
            self._report.measured(event["figures"])
        elif "told" in event:
            self.told = int(event["told"])
        elif "cut" in event:
            return "cut"
        return "want" if "want" in event else None

    def _end(self, name: str, result: str, seconds: float) -> None:
        if result == "frozen":
            self.stood_still = True
            self._report.stood_still(name, self._log)
        else:
            self._report.passed_or_failed(name, result, seconds, self._log)

    def freeze(self, unfinished: list[str]) -> None:
        """An emulated processor stood still: the host's, which was ended, or a guest's in it."""
        what = ", ".join(unfinished) or "nothing"
        say(f"smoke: host {self._number}: a processor stood still; it has not finished {what}")

    def close(self, unfinished: list[str], *, released: bool) -> None:
        """The host has ended.

        `unfinished` is what it was given and has not told the end of; `released`: it was told that
        there is no more.
        """
        if self.running is not None or unfinished:
            self._report.lost(self.running or unfinished[0], self._log)
        elif not released:
            self._report.lost(f"host-{self._number}", self._log)
