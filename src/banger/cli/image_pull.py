"""`banger image pull` and `banger image cache prune`: container images, and what they leave."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import ImageRecord
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.image_command import absolute_image
from banger.cli.server import Server
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command()
@click.argument("reference")
@click.option("--name", help="Name of the image [made from the reference].")
@click.option(
    "--kernel-ref", metavar="KERNEL", help="Kernel to boot it with [of the configuration]."
)
@click.option(
    "--platform", default="linux/amd64", show_default=True, help="Which of several to take."
)
@click.option(
    "--install-sshd",
    is_flag=True,
    help="VMs of it with --nat install openssh-server at their first boot.",
)
@click.option("--force", is_flag=True, help="Replace an image of that name that no VM uses.")
@_json
@quiet_option
@verbose_option
@click.pass_obj
def pull(
    guest: GuestCommand,
    reference: str,
    name: str | None,
    kernel_ref: str | None,
    platform: str,
    install_sshd: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Fetch an image of the catalog, or a container image, and make it bootable.

    \b
    banger image pull debian-bookworm             a published bundle, else built here
    banger image pull alpine:3.20
    banger image pull registry.example:5000/team/app@sha256:…
    banger image pull oci-archive:app.tar         or oci:DIR[:TAG]
    banger image pull docker-archive:saved.tar    what `docker save` writes
    banger image pull archive:rootfs.tar.xz       either of these, or a plain root filesystem
    """
    guest.refuse()
    params = p.PullImage(
        reference=absolute_image(reference),
        name=name,
        kernel_ref=kernel_ref,
        platform=platform,
        install_sshd=install_sshd,
        force=force,
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("image.pull", params, painter) as call,
    ):
        image = call.result(ImageRecord)
    if as_json:
        print_json(image)
    else:
        sys.stdout.write(f"{image.name} {format_size(-(-image.rootfs_bytes // MIB) * MIB)}\n")


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say how much it is.")
@_json
@click.pass_obj
def prune(guest: GuestCommand, dry_run: bool, as_json: bool) -> None:
    """Free what pulls keep for the next pull; stored images need none of it.

    Pulls keep it below oci_cache_limit themselves: what was not used for longest goes first.
    """
    guest.refuse()
    done = Server().call("image.cache.prune", p.PruneCache(dry_run=dry_run), r.PrunedCache)
    if as_json:
        print_json(done)
        return
    verb = "would free" if dry_run else "freed"
    used = f"; {done.in_use_blobs} more, {format_size(done.in_use_bytes)}, are in use"
    sys.stdout.write(
        f"{verb} {format_size(done.bytes)} in {done.blobs} blobs of {done.directory} "
        f"(limit {format_size(done.limit_bytes)}{used if done.in_use_blobs else ''})\n"
    )
