"""Whether a line is flat: its robust slope (Theil and Sen), with the certainty that it has one.

The slope is the median of the slopes between all pairs of samples, so that a third of the samples
may be anything. A line grows when two things hold: the 95 % interval of its slope lies above zero,
and the growth over the run is more than the line's bound.
Source: P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63 (1968).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is made once at the beginning is no growth: caches, thread pools, arenas, and the operations
# that the daemon knows for ten minutes, which is a sixth of the usual hour.
_WARM_UP = 1 / 6
_LEAST_WARM_UP = 2
_LEAST_SAMPLES = 8
_Z95 = 1.96

Word = Literal["flat", "grows", "too few samples"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How much a line may grow over the run: a share of its mean, or a number of its own unit."""

    share: float | None = None
    amount: float | None = None

    def __str__(self) -> str:
        return f"{self.share:.0%}" if self.share is not None else f"{self.amount:g}"

    def allows(self, growth: float, mean: float) -> bool:
        if self.share is not None:
            return growth <= self.share * mean
        assert self.amount is not None
        return growth <= self.amount


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Per unit of x; `low` is the lower end of its 95 % interval."""

    slope: float
    low: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`growth` is over the samples that were judged, in the line's unit."""

    word: Word
    samples: int
    mean: float
    least: float
    most: float
    growth: float


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> Slope:
    """The robust slope of at least two samples with different xs.

    Raises:
        ValueError: there is no pair with different xs.
    """
    slopes = sorted(
        (ys[j] - ys[i]) / (xs[j] - xs[i])
        for i in range(len(xs))
        for j in range(i + 1, len(xs))
        if xs[j] != xs[i]
    )
    if not slopes:
        raise ValueError("no two samples at different times")
    n = len(xs)
    spread = _Z95 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    below = max(0, round((len(slopes) - spread) / 2))
    return Slope(slope=statistics.median(slopes), low=slopes[below])


def judge(times_s: Sequence[float], values: Sequence[float], bound: Bound) -> Verdict:
    """Whether a line of samples is flat, its beginning left out."""
    skipped = max(_LEAST_WARM_UP, math.ceil(len(values) * _WARM_UP))
    xs, ys = times_s[skipped:], values[skipped:]
    shown = ys or values
    figures = {
        "samples": len(ys),
        "mean": statistics.fmean(shown),
        "least": min(shown),
        "most": max(shown),
    }
    if len(ys) < _LEAST_SAMPLES:
        return Verdict(word="too few samples", growth=0.0, **figures)  # type: ignore[arg-type]  # samples is an int
    slope = theil_sen(xs, ys)
    growth = slope.slope * (xs[-1] - xs[0])
    grows = slope.low > 0 and not bound.allows(growth, statistics.fmean(ys))
    return Verdict(word="grows" if grows else "flat", growth=growth, **figures)  # type: ignore[arg-type]  # as above
