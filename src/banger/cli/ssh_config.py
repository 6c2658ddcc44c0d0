"""`banger ssh-config`: plain `ssh web.vm`, for every program that uses OpenSSH's configuration.

banger's own file is kept fresh; `~/.ssh/config` is touched only by --install and --uninstall.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from banger.cli.errors import warn
from banger.cli.server import Server
from banger.config.program import module_command
from banger.errors import BangerError
from banger.files import write_atomic
from banger.ssh.client_config import build_stanza, edit_block, include_line, is_installed
from banger.ssh.known_hosts import copy_hosts

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand
    from banger.config.paths import Paths


@click.command(name="ssh-config")
@click.option("--install", is_flag=True, help="Include it from ~/.ssh/config.")
@click.option("--uninstall", is_flag=True, help="Take that out of ~/.ssh/config again.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def ssh_config(guest: GuestCommand, install: bool, uninstall: bool, as_json: bool) -> None:
    """Make `ssh NAME.vm` work, also for editors, rsync and git.

    \b
    banger ssh-config              what would be included, and whether it is
    banger ssh-config --install    from now on: ssh web.vm
    """
    guest.refuse()
    if install and uninstall:
        raise click.UsageError("--install and --uninstall exclude each other")
    paths = Server().paths
    stanza, user_file = paths.ssh_config, Path.home() / ".ssh" / "config"
    changed = False
    if not uninstall:
        _ensure_key(paths)
        refresh(paths, make=True)
    if install or uninstall:
        changed = edit_block(user_file, stanza, wanted=install)
    installed = _is_installed(user_file, stanza)
    if as_json:
        from banger.cli.draw import print_json

        print_json(
            {
                "path": str(stanza),
                "include": include_line(stanza),
                "ssh_config": str(user_file),
                "installed": installed,
                "changed": changed,
            }
        )
    elif install:
        done = "now includes" if changed else "includes already"
        sys.stdout.write(f"{user_file} {done} {stanza}\ntry: ssh NAME.vm\n")
    elif uninstall:
        done = "no longer includes" if changed else "did not include"
        sys.stdout.write(f"{user_file} {done} {stanza}\n")
    else:
        how = "it is included" if installed else "to include it: banger ssh-config --install"
        sys.stdout.write(f"{stanza}\n{include_line(stanza)}\n{how}\n")


def _is_installed(user_file: Path, stanza: Path) -> bool:
    try:
        return is_installed(user_file.read_bytes(), stanza)
    except OSError:
        return False


def _ensure_key(paths: Paths) -> None:
    from banger.config.settings import read_settings
    from banger.ssh.keys import ensure_owner_key

    if read_settings(*paths.config_files).ssh_key_path is None:
        ensure_owner_key(paths.ssh_key)


def _key(paths: Paths) -> Path:
    from banger.config.settings import read_settings

    configured = read_settings(*paths.config_files).ssh_key_path
    return Path(configured).expanduser() if configured else paths.ssh_key


def refresh(paths: Paths, *, make: bool = False) -> None:
    """Bring the owner's side up to date: the known hosts, and the stanza where there is one.

    Raises:
        BangerError: a file cannot be written.
    """
    try:
        copy_hosts(paths.known_hosts, paths.owner_known_hosts)
        if not make and not paths.ssh_config.exists():
            return
        content = build_stanza(
            key=_key(paths),
            known_hosts=(paths.owner_known_hosts, paths.known_hosts),
            proxy=[*module_command("banger.cli.entry"), "internal", "agent-proxy"],
            direct=paths.mode == "system",
        ).encode()
        with contextlib.suppress(FileNotFoundError):
            if paths.ssh_config.read_bytes() == content:
                return
        paths.ssh_config.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(paths.ssh_config, content)
    except OSError as e:
        raise BangerError(
            "operation_failed",
            f"writing {e.filename}: {e.strerror}",
            hint=f"ls -ld {paths.ssh_config.parent} {paths.owner_known_hosts.parent}",
        ) from e


def refresh_or_warn(paths: Paths) -> None:
    """`refresh` for commands that have done their work already."""
    try:
        refresh(paths)
    except BangerError as e:
        warn(str(e))
