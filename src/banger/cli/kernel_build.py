"""`banger kernel build`: a kernel compiled here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from banger.api.catalog import BuildKernel
from banger.api.records import KernelRecord
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.server import Server
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_LIMIT_BYTES = 1 << 20
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("recipe", metavar="KERNEL")
@click.option("--name", metavar="NAME", help="Name of the entry, where it is not KERNEL.")
@click.option(
    "--config-fragment",
    metavar="FILE",
    type=_FILE,
    help="Options (CONFIG_X=y) that go on top of the kernel's own.",
)
@click.option("--jobs", metavar="N", type=int, help="Compilers at a time; one for each processor.")
@click.option("--force", is_flag=True, help="Replace an entry of that name.")
@click.option(
    "--source",
    metavar="FILE",
    type=_FILE,
    help="A linux-*.tar.xz of kernel.org instead of Debian's sources.",
)
@click.option(
    "--signature", metavar="FILE", type=_FILE, help="Its signature; else the .tar.sign beside it."
)
@click.option(
    "--signing-key",
    metavar="FILE",
    type=_FILE,
    help="A newer copy of the key that signed; its fingerprint must be known.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
@verbose_option
@click.pass_obj
def build(
    guest: GuestCommand,
    recipe: str,
    name: str | None,
    config_fragment: Path | None,
    jobs: int | None,
    force: bool,
    source: Path | None,
    signature: Path | None,
    signing_key: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compile a kernel with everything built in; it takes minutes.

    The sources are Debian's, fetched and verified by this host's apt. What is missing on this host
    is named before anything is fetched.

    \b
    banger kernel build generic-6.12
    banger kernel build generic-6.12 --name mine --config-fragment more.config
    """
    guest.refuse()
    params = BuildKernel(
        recipe=recipe,
        name=name,
        fragment=_text(config_fragment),
        jobs=jobs,
        force=force,
        source=_absolute(source),
        signature=_absolute(signature),
        signing_key=_text(signing_key),
    )
    with (
        progress(quiet=quiet, verbose=verbose) as painter,
        Server().stream("kernel.build", params, painter) as call,
    ):
        kernel = call.result(KernelRecord)
    if as_json:
        print_json(kernel)
    else:
        sys.stdout.write(f"{kernel.name} {kernel.kernel_version}\n")


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _text(path: Path | None) -> str | None:
    """The content of a text file of the user's."""
    if path is None:
        return None
    problem: str
    try:
        with path.open("rb") as f:
            content = f.read(_LIMIT_BYTES + 1)
        if len(content) <= _LIMIT_BYTES:
            return content.decode()
        problem = f"it is larger than {_LIMIT_BYTES >> 20} MiB"
    except OSError as e:
        problem = e.strerror or str(e)
    except UnicodeDecodeError:
        problem = "it is no text"
    raise BangerError(
        "bad_request", f"reading {path}: {problem}", hint="banger kernel build --help"
    )
