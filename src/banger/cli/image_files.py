"""`banger image register` and `promote`: images out of files of the user's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from banger.api import catalog as c
from banger.api import params as p
from banger.api.records import ImageRecord
from banger.cli.complete import IMAGE, KERNEL
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.server import Server

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command()
@click.option("--name", required=True, help="Name of the new image.")
@click.option("--rootfs", required=True, metavar="FILE", help="A squashfs or ext4 root filesystem.")
@click.option("--kernel-ref", metavar="KERNEL", type=KERNEL, help="Kernel to boot it with.")
@click.option("--kernel", metavar="FILE", help="Or a kernel of its own: vmlinux or vmlinuz.")
@click.option("--initrd", metavar="FILE", help="With --kernel: a base initrd made by banger.")
@click.option("--modules", metavar="DIR", help="With --kernel: the directory of its modules.")
@click.option("--distro", default="linux", show_default=True, help="What `image list` shows.")
@_json
@quiet_option
@verbose_option
@click.pass_obj
def register(
    guest: GuestCommand,
    name: str,
    rootfs: str,
    kernel_ref: str | None,
    kernel: str | None,
    initrd: str | None,
    modules: str | None,
    distro: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Make an image of a root filesystem of yours, which stays where it is.

    \b
    banger image register --name mine --rootfs /srv/root.ext4 --kernel-ref debian-6.12-cloud
    banger image register --name own --rootfs /srv/root.sqfs --kernel /srv/vmlinuz --modules /srv/m

    VMs read the file and never write it. Leave it as it is while the image is there, or
    `banger image promote` it. A kernel of its own is copied and goes away with the image.
    """
    guest.refuse()
    params = c.RegisterImage(
        name=name,
        rootfs=str(Path(rootfs).absolute()),
        kernel_ref=kernel_ref,
        kernel=_absolute(kernel),
        initrd=_absolute(initrd),
        modules=_absolute(modules),
        distro=distro,
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("image.register", params, painter) as call,
    ):
        image = call.result(ImageRecord)
    if as_json:
        print_json(image)
    else:
        sys.stdout.write(f"{image.name} {image.rootfs_path}\n")


@click.command()
@click.argument("name", type=IMAGE)
@_json
@quiet_option
@verbose_option
@click.pass_obj
def promote(guest: GuestCommand, name: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Copy a registered image into banger's own storage; your file is then free."""
    guest.refuse()
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("image.promote", p.NameRef(name=name), painter) as call,
    ):
        image = call.result(ImageRecord)
    if as_json:
        print_json(image)
    else:
        sys.stdout.write(f"{image.name} {image.rootfs_path}\n")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
