"""`banger vm acp`: stdin, stdout and stderr joined with a coding agent in a guest.

An editor starts this as if it were the agent. Not a byte of ours goes to stdout.

Source: Agent Client Protocol, "Transports": JSON lines over the standard streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.cli import guest_run, sizing
from banger.cli.complete import VM
from banger.cli.server import Server
from banger.cli.vm_run import parse_env

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

# As a login shell would run it, so that its PATH has what the profile adds; but what a profile
# prints must not get into the protocol: until the exec, stdout leads to stderr.
_LOGIN = (
    "exec 3>&1 1>&2; "
    'case "${SHELL##*/}" in sh|bash|dash|ash|zsh|ksh) ;; *) SHELL=/bin/sh ;; esac; '
    """exec "$SHELL" -l -c 'exec "$@" 1>&3 3>&-' sh "$@\""""
)


@click.command()
@click.argument("vm", type=VM)
@click.option("--cwd", metavar="DIR", help="Directory to run in [the workspace, else home].")
@click.option("--user", help="User in the guest [root].")
@click.option("--env", metavar="K=V", multiple=True, help="Environment; repeatable.")
@click.pass_obj
def acp(
    guest: GuestCommand, vm: str, cwd: str | None, user: str | None, env: tuple[str, ...]
) -> int:
    """Join stdin and stdout with an agent in a VM that speaks the Agent Client Protocol.

    Without a command it is acp_command of the configuration. A program that is missing in the guest
    is an error before the first byte.

    \b
    banger vm acp web
    banger vm acp web -- opencode acp
    """
    argv = guest.argv or sizing.settings().acp_command
    server = Server()
    params = p.FindCommands(vm=vm, names=argv[:1], cwd=cwd, user=user)
    place = server.call("vm.acp.prepare", params, r.AgentPlace)
    access, sock = server.call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
    with sock:
        return guest_run.run(
            sock,
            access,
            argv=("sh", "-c", _LOGIN, "sh", *argv) if place.has_shell else tuple(argv),
            env=parse_env(env),
            user=user,
            want_tty=False,
            cwd=place.cwd,
            login=False,
        )
