"""`banger vm set`: more CPUs, memory or disk for VMs that exist."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.cli.complete import VM
from banger.cli.many import each, json_option
from banger.cli.server import Server
from banger.cli.sizing import Size
from banger.units import MIB

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand


@click.command(name="set")
@click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VM)
@click.option("--vcpu", type=int, help="Virtual CPUs.")
@click.option("--memory", type=Size(), help="Memory.")
@click.option("--disk-size", type=Size(), help="Room in /root; only grows.")
@click.option("--system-overlay-size", type=Size(), help="Room for system changes; only grows.")
@click.option("--nat/--no-nat", default=None, help="Reach the outside through this host; at once.")
@json_option
@click.pass_obj
def set_sizes(
    guest: GuestCommand,
    vms: tuple[str, ...],
    vcpu: int | None,
    memory: int | None,
    disk_size: int | None,
    system_overlay_size: int | None,
    nat: bool | None,
    as_json: bool,
) -> int:
    """Change VMs: sizes at their next start, the way out (--nat) at once."""
    guest.refuse()
    server = Server()

    def action(ref: str) -> r.SetResult:
        params = p.SetVm(
            vm=ref,
            vcpu=vcpu,
            memory_mib=None if memory is None else memory // MIB,
            disk_bytes=disk_size,
            overlay_bytes=system_overlay_size,
            nat=nat,
        )
        return server.call("vm.set", params, r.SetResult)

    def tell(result: r.SetResult) -> None:
        later = ", ".join(result.at_next_start)
        when = f"; at its next start: {later}" if later else ""
        sys.stdout.write(f"{result.vm.name} changed{when}\n")

    return each(vms, action, tell, as_json=as_json)
