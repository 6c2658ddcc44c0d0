"""`banger image export` and `banger kernel export`: bundles that others can pull."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from banger.cli.bundles import export, export_options
from banger.cli.complete import IMAGE, KERNEL
from banger.cli.draw import quiet_option

if TYPE_CHECKING:
    from pathlib import Path

    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(name="export")
@click.argument("name", type=IMAGE)
@export_options
@_json
@quiet_option
@click.pass_obj
def export_image(
    guest: GuestCommand,
    name: str,
    output: Path,
    index: Path | None,
    sign_key: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write an image as a bundle that others can pull.

    \b
    banger image export mine --output ./www
    banger image export mine --output ./www --index ./www/index.json --sign-key minisign.key
    """
    guest.refuse()
    export(
        "image.export",
        name,
        output=output,
        index=index,
        sign_key=sign_key,
        as_json=as_json,
        quiet=quiet,
    )


@click.command(name="export")
@click.argument("name", metavar="KERNEL", type=KERNEL)
@export_options
@_json
@quiet_option
@click.pass_obj
def export_kernel(
    guest: GuestCommand,
    name: str,
    output: Path,
    index: Path | None,
    sign_key: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a kernel as a bundle that others can pull.

    \b
    banger kernel export mine --output ./www
    banger kernel export mine --output ./www --index ./www/index.json --sign-key minisign.key
    """
    guest.refuse()
    export(
        "kernel.export",
        name,
        output=output,
        index=index,
        sign_key=sign_key,
        as_json=as_json,
        quiet=quiet,
    )
