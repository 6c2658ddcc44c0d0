"""bangerd on a host that sleeps on command: a file, the first argument, says how long in all.

It also looks for VMs that nobody uses every second, not every minute. Everything else is the
program itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from banger.daemon import clock

_SLEPT = Path(sys.argv.pop(1))
_read_clocks = clock.read_clocks


def read_clocks() -> clock.Reading:
    now = _read_clocks()
    slept_s = float(_SLEPT.read_text() or 0)
    return msgspec.structs.replace(now, boottime_s=now.boottime_s + slept_s)


# Before those who take it from there are loaded.
clock.read_clocks = read_clocks

from banger.daemon import sweeps  # noqa: E402
from banger.daemon.main import main  # noqa: E402

sweeps.STALE_EVERY_S = 1.0
main()
