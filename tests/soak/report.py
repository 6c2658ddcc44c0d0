"""What is kept of a soak: the samples as CSV, a table, and the place in the documentation."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tests.soak.judge import Verdict, judge
from tests.soak.lines import LINES, PICTURES

if TYPE_CHECKING:
    from pathlib import Path

_BEGIN, _END = "<!-- soak: begin -->", "<!-- soak: end -->"


@dataclass
class Run:
    """The samples of one run, in order; a sample is whole or not there."""

    facts: dict[str, Any]
    began: str
    samples: list[dict[str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def times_s(self) -> list[float]:
        return [sample["time_s"] for sample in self.samples]

    def values(self, name: str) -> list[float]:
        return [sample[name] for sample in self.samples]

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """By line; ask when no sample is to come any more."""
        return {
            line.name: judge(self.times_s, self.values(line.name), line.bound) for line in LINES
        }

    @property
    def grown(self) -> list[str]:
        return [name for name, verdict in self.verdicts.items() if verdict.word == "grows"]

    @property
    def minutes(self) -> float:
        return self.samples[-1]["time_s"] / 60 if self.samples else 0.0

    @property
    def headline(self) -> str:
        driver = f"{self.facts['driver']}, {self.facts['accel']}"
        return f"{len(self.samples)} cycles in {self.minutes:.0f} min ({driver}), {self.began[:10]}"


def write_csv(run: Run, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["time_s", *(line.name for line in LINES)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.samples)
    return path


def build_table(run: Run) -> str:
    """The judgement as a Markdown table."""
    rows = ["| Line | Mean | Least | Most | Growth over the run | Bound | |", "|---" * 7 + "|"]
    for line in LINES:
        v = run.verdicts[line.name]
        unit = f" {line.unit}" if line.unit else ""
        share = f" ({v.growth / v.mean:+.1%})" if v.mean else ""
        rows.append(
            f"| {line.words} | {v.mean:.0f}{unit} | {v.least:.0f} | {v.most:.0f} "
            f"| {v.growth:+.1f}{unit}{share} | {line.bound} | {v.word} |"
        )
    return "\n".join(rows) + "\n"


def build_section(run: Run, csv_name: str) -> str:
    """What stands between the markers of the documentation."""
    facts = run.facts
    broken = f"; **{len(run.failures)} cycles failed**" if run.failures else ""
    pictures = "\n".join(f"![{title}](soak-{kind}.svg)" for kind, title in PICTURES.items())
    return (
        f"The last soak, {run.began[:16].replace('T', ' ')} UTC: {len(run.samples)} cycles in "
        f"{run.minutes:.0f} minutes{broken}. {facts['driver']} ({facts['accel']}), "
        f"{facts['processors']} processors ({facts['cpu']}), Linux {facts['kernel']}, Python "
        f"{facts['python']}, commit {facts['commit'][:10]}. All samples: "
        f"[{csv_name}](../bench/results/{csv_name}).\n\n"
        f"{build_table(run)}\n{pictures}\n"
    )


def replace_section(text: str, section: str) -> str:
    """The document with another section between its markers.

    Raises:
        ValueError: it has none.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the document has no {_BEGIN} … {_END}")
    return f"{before}{begin}\n{section}{end}{after}"
