"""`banger daemon status, stop`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.cli.draw import print_json
from banger.cli.errors import warn
from banger.cli.server import Server
from banger.units import MIB

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def status(guest: GuestCommand, as_json: bool) -> None:
    """Show the daemon, its network, and which VMM serves and why. Starts the daemon if needed."""
    guest.refuse()
    s = Server().call("daemon.status", p.Empty(), r.DaemonStatus)
    if as_json:
        print_json(s)
        return
    vmm = s.vmm.driver or "none"
    if s.vmm.driver == "qemu":
        vmm += f" ({s.vmm.accel})"
    rows = [
        ("version", s.version),
        ("mode", s.mode),
        ("pid", str(s.pid)),
        ("socket", s.socket),
        ("log", s.log),
        ("memory", f"{s.rss_bytes / MIB:.1f} MiB"),
        ("running VMs", str(s.vms_running)),
        ("network", s.network + (f": {s.network_note}" if s.network_note else "")),
        ("names", (s.dns or "not answered") + (f": {s.dns_note}" if s.dns_note else "")),
        ("vmm", vmm),
        ("kvm", "usable" if s.vmm.kvm_usable else "not usable"),
        *(("", line) for line in s.vmm.evidence),
    ]
    if s.vmm.problem:
        rows.append(("problem", s.vmm.problem))
    sys.stdout.writelines(f"{name.ljust(12)} {value}\n" for name, value in rows)


@click.command()
@click.pass_obj
def stop(guest: GuestCommand) -> None:
    """End the daemon. VMs run on, and the next command starts a daemon that finds them."""
    guest.refuse()
    if not Server().stop():
        warn("the daemon is not running")
