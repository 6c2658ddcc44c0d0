"""VMs of scenarios: the shared one, which many small checks use, and short-lived ones of their own.

A boot takes seconds under emulation, so what does not need a machine of its own uses `shared()`.
The census of the others does not count what the shared VM holds.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.smoke.calls import OWNER, banger, expect
from tests.smoke.census import STATE, take_census, vmm_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = "shared"
# Every name that was used, so that the name server can be asked for those that are gone.
used_names: set[str] = set()
_held: Counter[str] = Counter()


def held_by_shared() -> Counter[str]:
    """What the shared VM adds to a census."""
    return _held


def shared() -> str:
    """The name of a running VM that the scenarios of its chain use one after the other."""
    if _held and (found := banger.done("vm", "show", SHARED)).status == 0:
        if json.loads(found.out)["state"] != "running":
            banger("vm", "start", SHARED)
        return SHARED
    before = take_census()
    create(SHARED)
    _held.clear()
    _held.update(take_census() - before)
    return SHARED


def drop_shared() -> None:
    """Delete the shared VM, if there is one."""
    if _held:
        _held.clear()
        banger("vm", "delete", SHARED)


def forget_shared() -> None:
    """The shared VM was deleted by somebody else."""
    _held.clear()


def create(name: str, *options: str) -> str:
    """`vm create` with a name, which is returned."""
    used_names.add(name)
    out = banger("vm", "create", "--name", name, *options)
    expect(out == f"{name}\n", f"stdout is {out!r}")
    return name


@contextlib.contextmanager
def vm(name: str, *options: str) -> Iterator[str]:
    """A VM that is deleted when the scenario comes to the end of the block."""
    yield create(name, *options)
    banger("vm", "delete", name)


def show(name: str) -> Any:
    """The record of a VM."""
    return banger.json("vm", "show", name)


def boot_id(name: str) -> str:
    """The boot id that the guest itself has."""
    return banger("vm", "exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id").strip()


def handles(name: str) -> Any:
    """What the VM holds on the host, as its daemon has written it down."""
    return json.loads((STATE / "vms" / show(name)["id"] / "handles.json").read_bytes())


def vmm_pid(name: str) -> int:
    """The pid of a VM's VMM, which must be alive."""
    pid = int(handles(name)["process"]["pid"])
    expect(pid in vmm_processes(), f"process {pid} of {name} runs no VMM")
    return pid


def owner_home() -> str:
    """The owner's home directory."""
    return f"/home/{OWNER}"
