"""VMs of scenarios: the shared one, which many small checks use, and short-lived ones of their own.

A boot takes seconds under emulation, so what does not need a machine of its own uses `shared()`.
The census of the others does not count what the shared VM holds.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.smoke.calls import OWNER, banger, expect
from tests.smoke.census import STATE, take_census, vmm_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = "shared"
# What a guest's kernel says last, and how long one has to be silent; less than its start waits.
_BOOT = "reboot: Restarting system"
_SILENT_S = 180.0
# Every name that was used, so that the name server can be asked for those that are gone.
used_names: set[str] = set()
_held: dict[str, Counter[str]] = {}


def held_by_shared() -> Counter[str]:
    """What the shared VMs add to a census."""
    return sum(_held.values(), Counter())


def shared(name: str = SHARED) -> str:
    """The name of a running VM that the scenarios of a chain use one after the other.

    It is made when the first of them asks, and deleted before a global scenario begins. A chain of
    its own may have a VM of its own, by another name.
    """
    if name in _held and (found := banger.done("vm", "show", name)).status == 0:
        if json.loads(found.out)["state"] != "running":
            banger("vm", "start", name)
        return name
    before = take_census()
    create(name)
    used_names.discard(name)
    _held[name] = take_census() - before
    return name


def drop_shared() -> None:
    """Delete the shared VMs, if there are any."""
    for name in tuple(_held):
        del _held[name]
        banger("vm", "delete", name)


def forget_shared() -> None:
    """The shared VMs were deleted by somebody else."""
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


def find_standing_still() -> list[str]:
    """The consoles of VMs whose emulated processor seems to have lost its interrupts."""
    now = time.time()
    return [
        str(path)
        for path in STATE.glob("vms/*/console.log")
        if stands_still(path.read_text(errors="replace"), now - path.stat().st_mtime)
    ]


def stands_still(console: str, silent_s: float) -> bool:
    """Whether a guest's kernel began, has come to no line of ours, and has said nothing since.

    The emulation of nested virtualisation loses timer interrupts. The host is woken by the runner,
    a guest by nobody before it has a network.
    """
    last_boot = console.rpartition(_BOOT)[2]
    return silent_s >= _SILENT_S and "[ " in last_boot and "banger: " not in last_boot
