"""`banger vm create`: the scripting primitive; prints the name of the VM it made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from banger.api import params as p
from banger.api.operations import Detached
from banger.api.records import VmRecord
from banger.cli import sizing
from banger.cli.complete import IMAGE
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.errors import warn
from banger.cli.image_command import absolute_image
from banger.cli.server import Server

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand


@click.command()
@click.option("--name", help="Name of the VM [generated].")
@click.option(
    "--image", type=IMAGE, help="Image to boot [default_image_name of the configuration]."
)
@sizing.sizing_options
@click.option("--nat", is_flag=True, help="Let it reach the outside through this host.")
@click.option("--no-start", is_flag=True, help="Only create it.")
@click.option("--allow-overcommit", is_flag=True, help="Start although the memory budget says no.")
@click.option(
    "--detach", is_flag=True, help="Do not wait; print the id of the operation that creates it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@quiet_option
@verbose_option
@click.pass_obj
def create(
    guest: GuestCommand,
    name: str | None,
    image: str | None,
    vcpu: int | None,
    memory: int | None,
    disk_size: int | None,
    system_overlay_size: int | None,
    nat: bool,
    no_start: bool,
    allow_overcommit: bool,
    detach: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Create a VM and wait until it is ready.

    \b
    name=$(banger vm create)
    banger vm create --name web --memory 4G --no-start
    """
    guest.refuse()
    size = sizing.resolve(vcpu, memory, disk_size, system_overlay_size)
    image = absolute_image(image or sizing.settings().default_image_name)
    if not quiet:
        sys.stderr.write(sizing.spec_line(size, image, nat=nat) + "\n")
    params = p.CreateVm(
        name=name,
        image=image,
        vcpu=size.vcpu,
        memory_mib=size.memory_mib,
        disk_bytes=size.disk_bytes,
        overlay_bytes=size.overlay_bytes,
        nat=nat,
        start=not no_start,
        allow_overcommit=allow_overcommit,
        detach=detach,
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("vm.create", params, painter) as call,
    ):
        made: Any = call.result(Detached if detach else VmRecord)
    if as_json:
        print_json(made)
    elif detach:
        sys.stdout.write(f"{made.op_id}\n")
        if not quiet:
            warn(f"wait for it with: banger daemon operations show {made.op_id}")
    else:
        sys.stdout.write(f"{made.name}\n")
