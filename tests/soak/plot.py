"""The pictures: one SVG for each kind of line, a panel for each line, time from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.soak.lines import LINES, PICTURES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.soak.report import Run

_PANEL_INCHES = 1.15
_WIDTH_INCHES = 9.0
_INK, _GRID, _GROWS = "#33557f", "#dddddd", "#b3261e"


def draw(run: Run, directory: Path) -> list[Path]:
    """Write `soak-<kind>.svg` for every kind; the paths.

    Each panel begins at zero, so that a flat line looks flat and noise looks as small as it is.
    """
    # Loaded here, so that a run that cannot be drawn still has its CSV and its table.
    import matplotlib as mpl

    mpl.use("svg")
    # Words stay words, and the same figures give the same bytes.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "banger", "font.size": 8})
    from matplotlib.figure import Figure

    minutes = [t / 60 for t in run.times_s]
    paths = []
    for kind, title in PICTURES.items():
        lines = [line for line in LINES if line.picture == kind]
        size = (_WIDTH_INCHES, _PANEL_INCHES * len(lines) + 0.7)
        figure = Figure(figsize=size)
        figure.subplots_adjust(
            left=0.08, right=0.98, hspace=0.6, bottom=0.5 / size[1], top=1 - 0.55 / size[1]
        )
        panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)
        for (panel,), line in zip(panels, lines, strict=True):
            values = run.values(line.name)
            verdict = run.verdicts[line.name]
            color = _GROWS if verdict.word == "grows" else _INK
            panel.plot(minutes, values, color=color, linewidth=1, marker=".", markersize=3)
            panel.set_ylim(0, max([*values, 1]) * 1.2)
            unit = f", {line.unit}" if line.unit else ""
            panel.set_title(f"{line.words.replace('`', '')}{unit}", loc="left", fontsize=8)
            panel.grid(color=_GRID, linewidth=0.5)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        panels[-1][0].set_xlabel("minutes")
        figure.suptitle(f"{title}: {run.headline}", fontsize=9)
        path = directory / f"soak-{kind}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        paths.append(path)
    return paths
