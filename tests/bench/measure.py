"""Figures: what was timed, what it is compared with, and whether it keeps its aim.

The two sides of a figure are timed in turn, in changing order, so that whatever else the machine
does meets both. Times are wall-clock seconds of a whole process or call.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Action = Callable[[], object]


@dataclass(kw_only=True)
class Figure:
    """One line of the table.

    With `theirs` the value is the ratio of the medians, ours to theirs; `throughput` turns it
    round, because there more is better. Without, it is the median of `ours` itself.
    """

    key: str
    title: str
    unit: str
    aim: float
    ours: list[float]
    theirs: list[float] = field(default_factory=list)
    against: str = ""
    throughput: bool = False
    load: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        if not self.theirs:
            return statistics.median(self.ours)
        ratio = statistics.median(self.ours) / statistics.median(self.theirs)
        return 1 / ratio if self.throughput else ratio

    @property
    def met(self) -> bool:
        return self.value >= self.aim if self.throughput else self.value <= self.aim

    def pair_ratios(self) -> list[float]:
        """The same ratio for every pair of neighbours: how much the figure moves."""
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return [1 / r for r in ratios] if self.throughput else ratios

    def document(self) -> dict[str, Any]:
        """The figure as it is kept in the results."""
        kept: dict[str, Any] = {
            "key": self.key,
            "title": self.title,
            "unit": self.unit,
            "aim": {"at_least" if self.throughput else "at_most": self.aim},
            "value": round(self.value, 4),
            "met": self.met,
            "load_before": self.load,
            "ours": _series(self.ours),
        }
        if self.theirs:
            kept["against"] = self.against
            kept["theirs"] = _series(self.theirs)
            kept["pair_ratios"] = [round(r, 4) for r in self.pair_ratios()]
        if self.parts:
            kept["parts"] = {k: round(v, 5) for k, v in self.parts.items()}
        return kept


def _series(runs: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(runs), 5), "runs": [round(r, 5) for r in runs]}


def load() -> tuple[float, ...]:
    """The machine's load averages, for the reader of a figure."""
    return tuple(round(x, 2) for x in os.getloadavg())


def seconds(action: Action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def alternate(
    runs: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Both sides `runs` times, after one run of each that is not counted."""
    ours()
    theirs()
    a: list[float] = []
    b: list[float] = []
    for i in range(runs):
        for side, series in ((ours, a), (theirs, b)) if i % 2 == 0 else ((theirs, b), (ours, a)):
            series.append(side())
    return a, b


def timed(argv: list[str], **options: Any) -> float:
    """Seconds that a command takes from its start to its end.

    Raises:
        RuntimeError: it ended with another status than 0; its stderr is in the message.
    """
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.DEVNULL)
    began = time.perf_counter()
    done = subprocess.run(argv, stderr=subprocess.PIPE, check=False, **options)
    took = time.perf_counter() - began
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace")
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}\n{words}")
    return took
