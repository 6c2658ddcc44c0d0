"""Which cells of a fault matrix a run takes, from one number that the run prints.

The fakes' matrix takes the same cells every time (seed 1), all of them with BANGER_SOAK set; a real
VM takes long, so that its cells change from day to day. BANGER_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")

EVERYTHING = "BANGER_SOAK" in os.environ
SEED = os.environ.get("BANGER_SEED", "1")
SEED_OF_THE_DAY = os.environ.get("BANGER_SEED") or datetime.now(UTC).strftime("%Y%m%d")


def pick(choices: Sequence[T], *where: str, seed: str = SEED) -> T:
    """One of the choices, the same one for the same seed and place, whatever else is picked."""
    return random.Random(":".join((seed, *where))).choice(choices)
