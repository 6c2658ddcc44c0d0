"""`banger image …`: root filesystems."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import ImageRecord
from banger.cli.complete import IMAGE
from banger.cli.draw import always_json, print_json, table
from banger.cli.many import each, json_option
from banger.cli.server import Server
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(name="list")
@_json
@click.pass_obj
def list_images(guest: GuestCommand, as_json: bool) -> None:
    """List images."""
    guest.refuse()
    images = Server().call("image.list", p.Empty(), list[ImageRecord])
    if as_json:
        print_json(images)
        return
    rows = [
        (
            i.name,
            i.distro,
            i.arch,
            i.kernel_ref,
            format_size(-(-i.rootfs_bytes // MIB) * MIB),
            "yes" if i.managed else "no",
            i.created_at[:19].replace("T", " "),
        )
        for i in images
    ]
    sys.stdout.write(
        table(("NAME", "DISTRO", "ARCH", "KERNEL", "SIZE", "MANAGED", "CREATED"), rows)
    )


@click.command()
@click.argument("name", type=IMAGE)
@always_json
@click.pass_obj
def show(guest: GuestCommand, name: str) -> None:
    """Show one image's record as JSON."""
    guest.refuse()
    print_json(Server().call("image.show", p.NameRef(name=name), ImageRecord))


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=IMAGE)
@json_option
@click.pass_obj
def verify(guest: GuestCommand, names: tuple[str, ...], as_json: bool) -> int:
    """Compare stored images with the hashes that were recorded when they were made."""
    guest.refuse()
    server = Server()
    return each(
        names,
        lambda name: server.call("image.verify", p.NameRef(name=name), ImageRecord),
        lambda image: sys.stdout.write(f"{image.name} ok\n"),
        as_json=as_json,
    )


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=IMAGE)
@json_option
@click.pass_obj
def delete(guest: GuestCommand, names: tuple[str, ...], as_json: bool) -> int:
    """Delete images that no VM uses."""
    guest.refuse()
    server = Server()
    return each(
        names,
        lambda name: server.call("image.delete", p.NameRef(name=name), r.Deleted),
        lambda result: sys.stdout.write(f"{result.name} deleted\n"),
        as_json=as_json,
    )
