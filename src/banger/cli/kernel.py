"""`banger kernel …`: what VMs boot with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import KernelRecord
from banger.cli.complete import KERNEL
from banger.cli.draw import print_json, progress, quiet_option, table, verbose_option
from banger.cli.many import each
from banger.cli.server import Server

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(name="list")
@click.option("--available", is_flag=True, help="Also what could be pulled.")
@_json
@click.pass_obj
def list_kernels(guest: GuestCommand, available: bool, as_json: bool) -> None:
    """List kernels."""
    guest.refuse()
    server = Server()
    kernels = server.call("kernel.list", p.Empty(), list[KernelRecord])
    if available:
        have = {k.name: k for k in kernels}
        names = sorted({*server.call("kernel.catalog", p.Empty(), list[str]), *have})
        if as_json:
            print_json(
                [{"name": n, "state": "pulled" if n in have else "available"} for n in names]
            )
        else:
            rows = [
                (
                    n,
                    "pulled" if n in have else "available",
                    have[n].kernel_version if n in have else "-",
                )
                for n in names
            ]
            sys.stdout.write(table(("NAME", "STATE", "VERSION"), rows))
    elif as_json:
        print_json(kernels)
    else:
        sys.stdout.write(
            table(
                ("NAME", "DISTRO", "ARCH", "VERSION", "IMPORTED"),
                [
                    (
                        k.name,
                        k.distro,
                        k.arch,
                        k.kernel_version,
                        k.imported_at[:19].replace("T", " "),
                    )
                    for k in kernels
                ],
            )
        )


@click.command()
@click.argument("name", type=KERNEL)
@click.pass_obj
def show(guest: GuestCommand, name: str) -> None:
    """Show one kernel's record as JSON."""
    guest.refuse()
    print_json(Server().call("kernel.show", p.NameRef(name=name), KernelRecord))


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace an entry of that name.")
@_json
@quiet_option
@verbose_option
@click.pass_obj
def pull(
    guest: GuestCommand, name: str, force: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Fetch a kernel from its source.

    \b
    banger kernel pull debian-6.12-cloud
    """
    guest.refuse()
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("kernel.pull", p.PullKernel(name=name, force=force), painter) as call,
    ):
        kernel = call.result(KernelRecord)
    if as_json:
        print_json(kernel)
    else:
        sys.stdout.write(f"{kernel.name} {kernel.kernel_version}\n")


@click.command(name="rm")
@click.argument("names", metavar="KERNEL...", nargs=-1, required=True, type=KERNEL)
@click.pass_obj
def remove(guest: GuestCommand, names: tuple[str, ...]) -> int:
    """Remove kernels that no image and no VM refers to."""
    guest.refuse()
    server = Server()
    return each(
        names,
        lambda name: server.call("kernel.delete", p.NameRef(name=name), r.Deleted),
        lambda result: sys.stdout.write(f"{result.name} deleted\n"),
    )
