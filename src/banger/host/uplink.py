"""The interface that leads out of this host, as far as guests with NAT have to know it.

Sources: proc_net_route (Linux, net/ipv4/fib_trie.c, fib_route_seq_show), sysfs-class-net.
"""

from __future__ import annotations

from pathlib import Path

_ROUTES = Path("/proc/net/route")
_LINKS = Path("/sys/class/net")
_ANYWHERE = "00000000"


def find_uplink_mtu(routes: Path = _ROUTES, links: Path = _LINKS) -> int | None:
    """The MTU in bytes of the default route's interface; None where there is no such route."""
    best: tuple[int, str] | None = None
    try:
        lines = routes.read_text(encoding="ascii", errors="replace").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) < 8 or fields[1] != _ANYWHERE or fields[7] != _ANYWHERE:
            continue
        candidate = (int(fields[6]), fields[0])
        best = candidate if best is None else min(best, candidate)
    if best is None:
        return None
    try:
        return int((links / best[1] / "mtu").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
