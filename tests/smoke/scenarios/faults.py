"""The daemon killed at named steps, under the real firecracker: other steps every day."""

from __future__ import annotations

import dataclasses
import json
import random
from datetime import UTC, datetime
from pathlib import Path

from tests.smoke.calls import Caller, expect, host, wait_until
from tests.smoke.census import links, vmm_processes
from tests.smoke.registry import scenario
from tests.smoke.user_mode import ROOT, stop_daemon, user_mode

_MARKS = Path("/var/lib/smoke-faults")
_LIST_STEPS = "import json, banger.faults; print(json.dumps(banger.faults.STEPS))"
_MOMENTS = ("before", "during", "after")
# Where all was done, the VM is there for good.
_PUBLISHED = ("start.publish:during", "start.publish:after")


@scenario("global", "a daemon of user mode killed at steps that its switch names: nothing is lost")
def killed_at_steps() -> None:
    seed = datetime.now(UTC).strftime("%Y%m%d")
    print(f"the seed is {seed}")
    dice = random.Random(seed)
    _MARKS.mkdir()
    try:
        with user_mode() as user:
            steps = _steps(user)
            start = [step for step in steps["start"] if step != "start.file_sync"]
            release = [*steps["stop"], *steps["release"]]
            before = _held()
            order = _killed(user, dice, [*steps["create"], *start], "vm", "create", "--name", "f")
            if user.vm_names():
                expect(order.startswith(_PUBLISHED), f"{order}: a VM that nobody was told of")
                user("vm", "delete", "f")
            expect(_held() == before, f"{order}: left over: {_held()}")
            user("vm", "create", "--name", "f")
            user("vm", "exec", "f", "--", "sh", "-c", "echo kept > /root/kept && sync")
            _killed(user, dice, release, "vm", "stop", "f")
            user("vm", "stop", "f")
            user("vm", "start", "f")
            kept = user("vm", "exec", "f", "--", "cat", "/root/kept")
            expect(kept == "kept\n", f"what was synced is {kept!r}")
            order = _killed(user, dice, [*release, *steps["delete"]], "vm", "delete", "f")
            if user.vm_names():
                user("vm", "delete", "f")
            expect(_held() == before, f"{order}: left over: {_held()}")
    finally:
        host("rm", "-rf", str(_MARKS))


def _steps(user: Caller) -> dict[str, list[str]]:
    """The steps of the installed banger, by the interpreter and the path that it runs with."""
    first, *code = Path(user.program).read_text().splitlines()
    path = [line for line in code if line.startswith(("import sys", "sys.path"))]
    python = first.removeprefix("#!").split()
    listed = user.run(*python, "-c", "\n".join([*path, _LIST_STEPS]))
    expect(listed.status == 0, f"the steps cannot be listed: {listed.err}")
    steps: dict[str, list[str]] = json.loads(listed.out)
    return steps


def _killed(user: Caller, dice: random.Random, steps: list[str], *command: str) -> str:
    """Run a command whose daemon is killed at one of the steps; the order that did it."""
    order = f"{dice.choice(steps)}:{dice.choice(_MOMENTS)}:kill"
    print(f"order: {order}")
    stop_daemon(user)
    faulty = dataclasses.replace(user, extra={**user.extra, "BANGER_FAULTS": f"{_MARKS}:{order}"})
    faulty.done(*command)
    expect((_MARKS / order).exists(), f"{order} was not met")
    return order


def _held() -> tuple[list[str], list[str]]:
    """What VMs of user mode hold when no VMM is left: links, files."""
    wait_until(lambda: not vmm_processes(), "every VMM to end")
    places = [ROOT / "state/banger/vms", ROOT / "run/banger/vms", ROOT / "run/banger/leases"]
    files = [str(path) for place in places if place.exists() for path in place.iterdir()]
    return sorted(link for link in links() if "tap-fc" in link), sorted(files)
