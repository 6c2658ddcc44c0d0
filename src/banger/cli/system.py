"""`banger system install, status, restart, uninstall`: banger as services of this host."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from typing import TYPE_CHECKING

import click

# Loaded now: an installed program that uninstalls itself finds no file of its own afterwards.
import banger.cli.errors  # noqa: F401
from banger.cli.draw import print_json
from banger.config.system_paths import SYSTEM
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.cli.guest_command import GuestCommand


@click.command()
@click.option("--owner", metavar="USER", required=True, help="Whose VMs these will be.")
@click.option("--force", is_flag=True, help="Give another owner's VMs to this one.")
@click.pass_obj
def install(guest: GuestCommand, owner: str, force: bool) -> None:
    """Install this banger as two services, or bring an installation up to date. VMs run on.

    \b
    sudo banger system install --owner $USER
    """
    guest.refuse()
    _require_root("install", "--owner", owner)
    from banger.system.installer import find_owner
    from banger.system.installer import install as do

    with _files("installing"):
        do(SYSTEM, find_owner(owner), force=force, say=_say)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def status(guest: GuestCommand, as_json: bool) -> int:
    """Show both services; status 0 only when both are ready."""
    guest.refuse()
    from banger.system.status import read_status

    s = read_status(SYSTEM)
    if as_json:
        print_json(s)
        return 0 if s.ready else 1
    rows = [
        ("owner", f"{s.record.owner} (uid {s.record.uid})"),
        ("release", s.release),
        ("installed", s.record.installed_at),
    ]
    for service in (s.daemon, s.helper):
        name = service.unit.removesuffix(".service")
        rows.append(
            (name, service.state + (f", version {service.version}" * bool(service.version)))
        )
        rows.append(("", service.socket))
        if service.problem:
            rows.append(("", service.problem))
    rows.append(("dns", s.dns or "-"))
    running = "?" if s.vms_running is None else s.vms_running
    rows.append(("VMs", f"{'?' if s.vms is None else s.vms}, {running} running"))
    sys.stdout.writelines(f"{name.ljust(12)} {value}\n" for name, value in rows)
    return 0 if s.ready else 1


@click.command()
@click.pass_obj
def restart(guest: GuestCommand) -> None:
    """Restart both services. VMs run on."""
    guest.refuse()
    _require_root("restart")
    from banger.system.restart import restart as do

    do(SYSTEM, say=_say)


@click.command()
@click.option("--purge", is_flag=True, help="Also images, kernels, VMs and the configuration.")
@click.option("--force", is_flag=True, help="Stop running VMs; go on where a step fails.")
@click.pass_obj
def uninstall(guest: GuestCommand, purge: bool, force: bool) -> None:
    """Remove the services and the programs. Your own configuration and ssh keys stay."""
    guest.refuse()
    _require_root("uninstall", *(["--purge"] if purge else []), *(["--force"] if force else []))
    from banger.system.uninstaller import uninstall as do

    with _files("uninstalling"):
        do(SYSTEM, purge=purge, force=force, say=_say)


def _require_root(*words: str) -> None:
    if os.geteuid() != 0:
        command = shlex.join(["banger", "system", *words])
        raise BangerError(
            "unauthorized",
            f"`{command}` changes this host: it needs root",
            hint=f"sudo {command}",
        )


@contextlib.contextmanager
def _files(doing: str) -> Iterator[None]:
    """The host's files are somebody else's affair: what the kernel says of them is the reason."""
    try:
        yield
    except OSError as e:
        raise BangerError(
            "operation_failed", f"{doing}: {e.filename}: {e.strerror}", hint="df -h /usr/local"
        ) from e


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
