"""`banger image build`: an image from a recipe, or from another image and what is added to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from banger import files
from banger.api import params as p
from banger.api import results as r
from banger.api.records import ImageRecord
from banger.cli import sizing
from banger.cli.complete import FEATURE, IMAGE, KERNEL, RECIPE
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.errors import warn
from banger.cli.image_command import absolute_image
from banger.cli.server import Server
from banger.errors import BangerError
from banger.names import temporary_image_name
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--name", help="Name of the new image.")
@click.option("--recipe", type=RECIPE, metavar="NAME|FILE", help="What to build it from.")
@click.option("--from-image", type=IMAGE, metavar="IMAGE", help="Or the image to begin with.")
@click.option("--archive", type=_FILE, metavar="FILE", help="The root of a recipe that takes one.")
@click.option("--package", "packages", multiple=True, help="Install it with the guest's manager.")
@click.option("--feature", "features", multiple=True, type=FEATURE, help="Add it: docker, agents.")
@click.option("--docker", is_flag=True, help="The same as --feature docker.")
@click.option("--script", "scripts", multiple=True, type=_FILE, help="Run it with sh -eu, as root.")
@click.option("--kernel-ref", type=KERNEL, metavar="KERNEL", help="Kernel to boot it with.")
@click.option("--nat", is_flag=True, help="A way out for scripts, which packages bring anyway.")
@sizing.sizing_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the root filesystem there and store no image.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an image that no VM uses, or the FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
@verbose_option
@click.pass_obj
def build(
    guest: GuestCommand,
    name: str | None,
    recipe: str | None,
    from_image: str | None,
    archive: Path | None,
    packages: tuple[str, ...],
    features: tuple[str, ...],
    docker: bool,
    scripts: tuple[Path, ...],
    kernel_ref: str | None,
    nat: bool,
    vcpu: int | None,
    memory: int | None,
    disk_size: int | None,
    system_overlay_size: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Build an image from a recipe, or from another image.

    \b
    banger image build --name debian-bookworm --recipe debian-bookworm
    banger image build --name web --from-image debian-bookworm --package nginx --script setup.sh
    banger image build --name alpine --recipe alpine --archive alpine-rootfs.tar.gz

    From another image a machine is booted, furnished and made the new image; its sizes are the
    ones of a new VM.
    """
    guest.refuse()
    if (recipe is None) == (from_image is None):
        raise click.UsageError("either --recipe or --from-image")
    if (name is None) == (output is None):
        raise click.UsageError("either --name or --output")
    if output is not None and output.exists() and not force:
        raise BangerError("already_exists", f"there is a file {output}", hint=f"rm {output}")
    params = p.BuildImage(
        name=name or temporary_image_name(),
        recipe=str(Path(recipe).absolute()) if recipe and recipe.endswith(".toml") else recipe,
        from_image=None if from_image is None else absolute_image(from_image),
        archive=None if archive is None else str(archive.absolute()),
        packages=packages,
        features=(*features, "docker") if docker else features,
        scripts=tuple(str(script.absolute()) for script in scripts),
        kernel_ref=kernel_ref,
        nat=nat,
        vcpu=vcpu,
        memory_mib=None if memory is None else memory // MIB,
        disk_bytes=disk_size,
        overlay_bytes=system_overlay_size,
        force=force,
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("image.build", params, painter) as call,
    ):
        image = call.result(ImageRecord)
    for missing in image.optional_missing:
        warn(f"warning: the optional {missing} could not be had")
    if output is not None:
        image = _move_out(image, output)
    if as_json:
        print_json(image)
    else:
        size = format_size(-(-image.rootfs_bytes // MIB) * MIB)
        sys.stdout.write(f"{output or image.name} {size}\n")


def _move_out(image: ImageRecord, output: Path) -> ImageRecord:
    """The root filesystem of a temporary image as a file, and the image gone."""
    beside = output.with_name(f".{output.name}.{image.id[:8]}")
    try:
        files.clone(Path(image.rootfs_path), beside, mode=0o644)
        files.sync_file(beside)
        beside.replace(output)
    except OSError as e:
        raise BangerError(
            "operation_failed", f"writing {output}: {e.strerror}", hint=f"ls -ld {output.parent}"
        ) from e
    finally:
        beside.unlink(missing_ok=True)
        Server().call("image.delete", p.NameRef(name=image.name), r.Deleted)
    return msgspec.structs.replace(image, rootfs_path=str(output.absolute()))
