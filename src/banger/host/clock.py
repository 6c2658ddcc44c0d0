"""The host's clocks, and whether one of them has jumped: it slept, or somebody set its time.

Values only; who has to be told is for those who ask. Source: clock_gettime(2).
"""

from __future__ import annotations

import time

import msgspec

# The agent of a guest steps its clock beyond the same difference.
_TOLERANCE_S = 1.0


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """All clocks at one moment, in seconds.

    `monotonic_s` stands still while the host sleeps, `boottime_s` does not, `unix_s` may be set.
    """

    monotonic_s: float
    boottime_s: float
    unix_s: float


def read_clocks() -> Reading:
    return Reading(
        monotonic_s=time.clock_gettime(time.CLOCK_MONOTONIC),
        boottime_s=time.clock_gettime(time.CLOCK_BOOTTIME),
        unix_s=time.time(),
    )


def find_jump(before: Reading, now: Reading) -> str | None:
    """What happened to the clocks in between, for the log; None: they went on evenly."""
    slept = (now.boottime_s - now.monotonic_s) - (before.boottime_s - before.monotonic_s)
    if slept > _TOLERANCE_S:
        return f"the host slept for {slept:.0f} s"
    moved = (now.unix_s - now.boottime_s) - (before.unix_s - before.boottime_s)
    if abs(moved) > _TOLERANCE_S:
        return f"the host's clock was set {abs(moved):.0f} s {'ahead' if moved > 0 else 'back'}"
    return None
