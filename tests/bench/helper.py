"""The helper's share of a start: leases made and given back, with a tap pool and without.

Needs root: it works in the network namespace in which it is called, on a bridge of its own, and
leaves nothing. `lease_times` is for callers with an installed helper of their own as well.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.measure import Figure, alternate, load, seconds

_HELPER = Path(__file__).resolve().parents[2] / "src" / "banger_root"
_BRIDGE = {"name": "br-fc-hb", "address": "10.218.0.1", "prefix": 24}
_POOL = 4


class HelperLine:
    """One connected socket to a helper."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile("rb")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a call.

        Raises:
            RuntimeError: the helper refused, or has ended.
        """
        request = {"version": 1, "method": method, "params": params}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(self._answers.readline() or b"{}")
        if "result" not in answer:
            raise RuntimeError(f"{method}: {answer}")
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        self._answers.close()
        self._connection.close()


def lease_times(line: HelperLine, runs: int, *, nat: bool = False) -> list[Figure]:
    """Seconds of `prepare` and of `release`, each with a pool against without."""
    before = load()
    sides = {"pool": _POOL, "none": 0}
    times: dict[tuple[str, str], list[float]] = {}
    # Something stays on the bridge, so that neither side makes and deletes bridge and rules.
    keeper = _params(2, nat=nat)
    line.call("prepare", **keeper)

    def measure(side: str) -> float:
        line.call("sweep", pool={"bridge": _BRIDGE, "size": sides[side]})
        params = _params(3, nat=nat)
        prepare = seconds(lambda: line.call("prepare", **params))
        release = seconds(lambda: line.call("release", id=params["vm_id"]))
        times.setdefault(("prepare", side), []).append(prepare)
        times.setdefault(("release", side), []).append(release)
        return prepare + release

    try:
        alternate(runs, lambda: measure("pool"), lambda: measure("none"))
    finally:
        line.call("release", id=keeper["vm_id"])
        line.call("sweep", pool={"bridge": _BRIDGE, "size": 0})
    return [
        Figure(
            key=f"{call}_lease",
            title=f"helper: {call}{' with NAT' if nat else ''}, tap from the pool",
            against="a tap of its own",
            unit="s",
            aim=1.0,
            # Without the first of each, which is not counted.
            ours=times[call, "pool"][1:],
            theirs=times[call, "none"][1:],
            load=before,
        )
        for call in ("prepare", "release")
    ]


@contextmanager
def own_helper() -> Iterator[HelperLine]:
    """A helper of the bench's own, as the daemon starts it in user mode, its ledger in /run."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="bb-", dir="/run") as directory, theirs:
        argv = ["/usr/bin/python3", "-I", "-S", "-B", str(_HELPER), "--owner-uid", "0"]
        process = subprocess.Popen(
            [*argv, "--ledger", f"{directory}/leases", "--fd", "0"],
            stdin=theirs.fileno(),
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        line = HelperLine(ours)
        try:
            yield line
        finally:
            line.close()
            process.wait(timeout=60)


def _params(number: int, *, nat: bool) -> dict[str, Any]:
    address = f"10.218.0.{number}"
    return {
        "vm_id": secrets.token_hex(16),
        "bridge": _BRIDGE,
        "guest": {"address": address, "mac": f"06:00:0a:da:00:{number:02x}"},
        "isolate": True,
        "announce_port": 7001,
        "nat": nat,
        "guest_host_ports": [],
        "limits": {"vcpu": 1, "memory_mib": 128},
        "jail": False,
    }


def main() -> None:
    """`unshare --net python -m tests.bench.helper [RUNS]` from the root of the checkout."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with own_helper() as line:
        figures = [figure for nat in (False, True) for figure in lease_times(line, runs, nat=nat)]
    for figure in figures:
        document = figure.document()
        sys.stdout.write(
            f"{figure.title}: {document['ours']['median'] * 1000:.1f} ms, {figure.against}: "
            f"{document['theirs']['median'] * 1000:.1f} ms, ratio {figure.value:.2f}\n"
        )


if __name__ == "__main__":
    main()
