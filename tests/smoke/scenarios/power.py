"""The host loses its power while a guest writes."""

from __future__ import annotations

import os
import subprocess

from tests.smoke import events, guests
from tests.smoke.calls import banger, expect, units_active
from tests.smoke.census import STATE
from tests.smoke.registry import scenario

_NUMBERS = 15
# sync(1) with a file's name is fsync(2): a number is told when it is on disk. On both disks.
_WRITER = """
    i=0
    while :; do
        i=$((i+1))
        echo $i >> /root/records; echo $i >> /var/lib/records
        sync /root/records /var/lib/records
        echo $i
    done
"""


@scenario("global", "the power cut under a writing guest: what was synced and told is there")
def power_cut() -> None:
    if events.before_the_cut is None:
        _lose_power()
    else:
        _look_again(events.before_the_cut)


def _lose_power() -> None:
    # What was there before is not tried here; what is made now has nothing but its own syncs.
    os.sync()
    guests.create("gone", "--no-start")
    guests.create("power")
    banger("vm", "delete", "gone")
    guests.create("new", "--no-start")
    writer = banger.banger_started(
        "vm", "exec", "power", "--", "sh", "-c", _WRITER,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdout is not None
    with writer.stdout as lines:
        for line in lines:
            number = int(line)
            events.emit(told=number)
            if number == _NUMBERS:
                # At once: what is not synced by now must not get the time to be.
                events.emit(cut=True)
    raise AssertionError("the guest has stopped writing, and the power is still there")


def _look_again(told: int) -> None:
    expect(told >= _NUMBERS, f"only {told} numbers were told")
    expect(units_active("bangerd.service", "bangerd-root.service"), "the services are not up")
    expect(sorted(banger.vm_names()) == ["new", "power"], "the list is wrong")
    record = guests.show("power")
    expect(record["state"] == "stopped", f"after the cut it is {record['state']}")
    left = [p.name for p in STATE.glob("vms/*/.*")]
    expect(not left, f"half-written files are left: {left}")
    banger("vm", "start", "power")
    for path in ("/root/records", "/var/lib/records"):
        kept = banger("vm", "exec", "power", "--", "cat", path).split("\n")
        wanted = [str(number) for number in range(1, told + 1)]
        expect(kept[:told] == wanted, f"{path}: {told} were told, and it has {kept}")
    expect((STATE / "vms" / guests.show("new")["id"] / "secrets.json").is_file(), "no secrets")
    banger("vm", "delete", "power", "new")
