"""bangerd on a host that sleeps, and whose disk fills up, on command.

Files in a directory, the first argument, give the orders: `slept` is how long the host has slept,
in seconds; `free` how many bytes are free, and while it is absent the disk decides. VMs that nobody
uses are looked for every second, not every minute. Everything else is the program itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from banger.host import clock

_ORDERS = Path(sys.argv.pop(1))
_read_clocks = clock.read_clocks


def read_clocks() -> clock.Reading:
    now = _read_clocks()
    return msgspec.structs.replace(now, boottime_s=now.boottime_s + (_order("slept") or 0))


def free_bytes(path: Path) -> int:
    free = _order("free")
    return _free_bytes(path) if free is None else int(free)


def _order(name: str) -> float | None:
    try:
        return float((_ORDERS / name).read_text())
    except FileNotFoundError:
        return None


# Before those who take it from there are loaded.
clock.read_clocks = read_clocks

from banger.daemon import sweeps  # noqa: E402
from banger.daemon.main import main  # noqa: E402
from banger.vm import space  # noqa: E402

_free_bytes = space.free_bytes
space.free_bytes = free_bytes

sweeps.STALE_EVERY_S = 1.0
main()
