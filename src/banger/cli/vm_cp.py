"""`banger vm cp`: files into a VM, or out of it, spoken with the agent itself.

A file gets its name when it is whole, on either side; a copy that was interrupted goes on where it
stopped when it is asked for again. What comes out of a guest lands below the directory that was
named and nowhere else.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, NamedTuple

import click

from banger.cli.copying import Copying
from banger.cli.draw import progress, quiet_option
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_REMOTE = re.compile(r"(?P<vm>[A-Za-z0-9][A-Za-z0-9-]*):(?P<path>.*)", re.DOTALL)
_HOME = "/root"


class _Remote(NamedTuple):
    vm: str
    path: str


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@quiet_option
@click.pass_obj
def cp(guest: GuestCommand, source: str, target: str, quiet: bool) -> None:
    """Copy files into a running VM, or out of it. One side is VM:PATH; `-` is stdin or stdout.

    \b
    banger vm cp ./data web:/root/data        a file or a directory
    banger vm cp web:/var/log/syslog .
    banger vm cp web:result.json - | jq .

    Into an existing directory goes the thing itself, else DST is its new name. A path that is not
    absolute is below the guest's /root. Modes are kept, links stay links; in the guest files belong
    to root, here to you. After an interruption the same command goes on where it stopped; what is
    the same on both sides is not copied again.
    """
    guest.refuse()
    here, there = _parse(source), _parse(target)
    remote = here or there
    if remote is None or (here is not None and there is not None):
        raise click.UsageError("one of SRC and DST is VM:PATH, the other a path of this host")
    with progress(quiet=quiet) as painter:
        copying = Copying(remote.vm, painter)
        try:
            if here is not None:
                from banger.cli.cp_out import download

                download(copying, here.path, target)
            else:
                from banger.cli.cp_in import upload

                upload(copying, source, remote.path)
        except BangerError as e:
            if e.reason != "connection_lost":
                raise
            again = shlex.join(["banger", "vm", "cp", source, target])
            raise BangerError(
                e.code, f"{e.message}; once it runs again the copy can go on", hint=again,
                reason=e.reason,
            ) from e  # fmt: skip
        copying.finish()


def _parse(word: str) -> _Remote | None:
    """A path in a VM; None for one of this host: `-`, or with a slash before its first colon."""
    found = _REMOTE.fullmatch(word)
    if found is None:
        return None
    path = found["path"]
    if not path.startswith("/"):
        path = f"{_HOME}/{path.removeprefix('~/')}"
    return _Remote(found["vm"], path)
