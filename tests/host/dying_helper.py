"""The root helper, with a bomb: it kills itself at a chosen moment of `prepare` or `release`.

Arguments: the moment, then the helper's own. `save:N` dies after the Nth write of the ledger,
before what it announces is made; `made:STEP` and `undone:STEP` die right after a step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../src"))

from banger_root import cgroup, nft, pool, steps
from banger_root.ledger import Ledger
from banger_root.server import main


def die_after(owner: Any, name: str, *, call: int = 1) -> None:
    real: Callable[..., Any] = getattr(owner, name)
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        result = real(*arguments, **options)
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


MADE = {
    "bridge": (steps, "ensure_bridge"),
    "tap": (steps, "make_tap"),
    "elements": (nft, "add_elements"),
    "port": (steps, "attach_tap"),
    "cgroup": (cgroup, "make_cgroup"),
}
UNDONE = {
    "cgroup": (cgroup, "remove_cgroup"),
    "tap": (pool, "remove_tap"),
    "port": (pool, "attach_tap"),
    "elements": (nft, "remove_elements"),
    "bridge": (steps, "remove_bridge_if_unused"),
}


def arm(moment: str) -> None:
    kind, _, which = moment.partition(":")
    if kind == "save":
        die_after(Ledger, "save", call=int(which))
    elif kind == "made":
        die_after(*MADE[which])
    else:
        die_after(*UNDONE[which])


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
