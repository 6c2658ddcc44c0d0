"""What an image says about commands, as the command line applies it (spec 5.7); and its name.

Pure, but for reading the present directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api.records import ImageConfig

_FILES = ("oci-archive:", "docker-archive:", "oci:", "archive:")
# Perhaps a repository: a place holds a slash.
_UNCLEAR = ("oci:", "archive:")


def command_options(command: Any) -> Any:
    """--entrypoint and --default-command."""
    for option in (
        click.option(
            "--default-command", is_flag=True, help="Run the image's own ENTRYPOINT and CMD."
        ),
        click.option(
            "--entrypoint", metavar="PROGRAM", help='In place of the image\'s ENTRYPOINT; "": none.'
        ),
    ):
        command = option(command)
    return command


def check_options(argv: tuple[str, ...] | None, *, default_command: bool, detach: bool) -> None:
    """Raises click.UsageError for options that contradict each other."""
    if default_command and argv is not None:
        raise click.UsageError("--default-command takes no command after --")
    if default_command and detach:
        raise click.UsageError("-d and --default-command exclude each other")


def compose(
    config: ImageConfig | None,
    argv: tuple[str, ...] | None,
    *,
    entrypoint: str | None,
    default_command: bool,
) -> tuple[str, ...]:
    """The words to run; none for a shell. `argv` is None where the user gave no command.

    Raises:
        BangerError: not_found: the image names no command to run.
    """
    front = config.entrypoint if config else ()
    if entrypoint is not None:
        front = (entrypoint,) if entrypoint else ()
    if argv is not None:
        return (*front, *argv)
    if not default_command:
        return front if entrypoint else ()
    words = (*front, *(config.cmd if config else ()))
    if not words:
        raise BangerError(
            "not_found",
            "the image names neither ENTRYPOINT nor CMD",
            hint="banger vm run --image IMAGE -- CMD",
        )
    return words


def absolute_image(image: str) -> str:
    """An image as the daemon understands it: paths of archives are absolute."""
    for scheme in _FILES:
        rest = image.removeprefix(scheme)
        if rest != image and rest and (scheme not in _UNCLEAR or "/" in rest):
            return scheme + str(Path(rest).expanduser().absolute())
    return image
