"""`banger vm exec`: one more command in a VM that runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.api import workspaces as w
from banger.cli import guest_run
from banger.cli.complete import VM
from banger.cli.draw import progress
from banger.cli.errors import warn
from banger.cli.server import Server
from banger.cli.vm_run import parse_env

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand


@click.command(name="exec")
@click.argument("vm", type=VM)
@click.option("--guest-path", metavar="DIR", help="Directory to run in [the workspace, else home].")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("--user", help="User in the guest [root].")
@click.option("--env", "env", metavar="K=V", multiple=True, help="Environment; repeatable.")
@click.option(
    "--auto-prepare", is_flag=True, help="First bring the workspace up to date with its source."
)
@click.pass_obj
def exec_command(
    guest: GuestCommand,
    vm: str,
    guest_path: str | None,
    auto_prepare: bool,
    tty: bool,
    user: str | None,
    env: tuple[str, ...],
) -> int:
    """Run a command in a running VM; its exit status is banger's.

    \b
    banger vm exec web -- uname -a
    banger vm exec -t web -- top
    banger vm exec --auto-prepare web -- make test     on what you have here now
    """
    argv = guest.required()
    server = Server()
    if auto_prepare:
        with (
            progress(quiet=not sys.stderr.isatty()) as painter,
            server.stream(
                "vm.workspace.prepare", w.PrepareWorkspace(vm=vm, guest_path=guest_path), painter
            ) as call,
        ):
            call.result(w.PreparedWorkspace)
    params = p.ConnectVm(vm=vm, check_workspace=not auto_prepare and guest_path is None)
    access, sock = server.call_with_fd("vm.connect", params, r.AgentAccess)
    if access.stale is not None:
        warn(f"warning: {access.stale}; bring it up to date with --auto-prepare")
    with sock:
        return guest_run.run(
            sock,
            access,
            argv=guest_run.through_mise(access, argv, guest_path),
            env=parse_env(env),
            user=user,
            want_tty=tty,
            cwd=guest_path,
        )
