"""`banger kernel …`: what VMs boot with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.api.catalog import ImportKernel, KernelCatalog
from banger.api.records import KernelRecord
from banger.cli.complete import KERNEL
from banger.cli.draw import always_json, print_json, progress, quiet_option, table, verbose_option
from banger.cli.errors import warn
from banger.cli.many import each, json_option
from banger.cli.server import Server
from banger.units import MIB, format_size

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
    if available:
        _list_available(as_json=as_json)
        return
    kernels = Server().call("kernel.list", p.Empty(), list[KernelRecord])
    if as_json:
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


def _list_available(*, as_json: bool) -> None:
    catalog = Server().call("kernel.catalog", p.Empty(), KernelCatalog)
    if catalog.problem is not None:
        warn(f"the published kernels are not known: {catalog.problem}")
    if as_json:
        rows = (
            {**msgspec.to_builtins(k), "state": "pulled" if k.pulled else "available"}
            for k in catalog.kernels
        )
        print_json(list(rows))
        return
    sys.stdout.write(
        table(
            ("NAME", "STATE", "VERSION", "SIZE", "SOURCE", "DESCRIPTION"),
            [
                (
                    k.name,
                    "pulled" if k.pulled else "available",
                    k.version or "newest",
                    "-" if k.size_bytes is None else format_size(-(-k.size_bytes // MIB) * MIB),
                    k.source,
                    k.description,
                )
                for k in catalog.kernels
            ],
        )
    )


@click.command()
@click.argument("name", type=KERNEL)
@always_json
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
    """Fetch a kernel: a published bundle where the index has one, else from its own source.

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


@click.command(name="import")
@click.argument("name")
@click.option(
    "--from",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Holds vmlinux or vmlinuz; perhaps modules/ and config.",
)
@click.option("--distro", required=True, help="What `kernel list` shows.")
@click.option("--arch", default="amd64", show_default=True, help="Its processor.")
@click.option("--force", is_flag=True, help="Replace an entry of that name.")
@_json
@quiet_option
@verbose_option
@click.pass_obj
def import_kernel(
    guest: GuestCommand,
    name: str,
    directory: Path,
    distro: str,
    arch: str,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Make an entry of a kernel of yours; the files are copied.

    \b
    banger kernel import mine --from ./linux-6.12 --distro debian
    """
    guest.refuse()
    params = ImportKernel(
        name=name, directory=str(directory.resolve()), distro=distro, arch=arch, force=force
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("kernel.import", params, painter) as call,
    ):
        kernel = call.result(KernelRecord)
    if as_json:
        print_json(kernel)
    else:
        sys.stdout.write(f"{kernel.name} {kernel.kernel_version}\n")


@click.command(name="rm")
@click.argument("names", metavar="KERNEL...", nargs=-1, required=True, type=KERNEL)
@json_option
@click.pass_obj
def remove(guest: GuestCommand, names: tuple[str, ...], as_json: bool) -> int:
    """Remove kernels that no image and no VM refers to."""
    guest.refuse()
    server = Server()
    return each(
        names,
        lambda name: server.call("kernel.delete", p.NameRef(name=name), r.Deleted),
        lambda result: sys.stdout.write(f"{result.name} deleted\n"),
        as_json=as_json,
    )
