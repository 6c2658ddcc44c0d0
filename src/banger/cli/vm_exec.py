"""`banger vm exec` and `banger vm ssh`: into a VM that runs."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.cli import guest_run
from banger.cli.complete import VM
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
@click.pass_obj
def exec_command(
    guest: GuestCommand,
    vm: str,
    guest_path: str | None,
    tty: bool,
    user: str | None,
    env: tuple[str, ...],
) -> int:
    """Run a command in a running VM; its exit status is banger's.

    \b
    banger vm exec web -- uname -a
    banger vm exec -t web -- top
    """
    argv = guest.required()
    server = Server()
    access, sock = server.call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
    with sock:
        return guest_run.run(
            sock,
            access,
            argv=argv,
            env=parse_env(env),
            user=user,
            want_tty=tty,
            cwd=guest_path,
        )


@click.command()
@click.argument("vm", type=VM)
@click.pass_obj
def ssh(guest: GuestCommand, vm: str) -> int:
    """Log in to a running VM with OpenSSH; through the agent when the guest has no sshd.

    \b
    banger vm ssh web
    banger vm ssh web -- 'df -h | tail -1'     one argument is a line for the remote shell
    """
    server = Server()
    access = server.call("vm.ssh", p.VmRef(vm=vm), r.SshAccess)
    name = access.vm.name
    try:
        if access.sshd:
            return _openssh(access, guest.argv or ())
        agent, sock = server.call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
        words = guest.argv or ()
        argv = ("sh", "-c", words[0]) if len(words) == 1 else words
        with sock:
            return guest_run.run(sock, agent, argv=argv, env={}, user=None, want_tty=True)
    finally:
        if guest.argv is None:
            warn(f"VM {name} still runs; stop it with: banger vm stop {name}")


def _openssh(access: r.SshAccess, words: tuple[str, ...]) -> int:
    from banger.process import get_program, run_attached

    name = access.vm.name
    argv = [get_program("ssh", package="openssh-client"), "-F", "none"]
    for option in (
        f"HostKeyAlias={name}.vm",
        f"UserKnownHostsFile={access.known_hosts}",
        "GlobalKnownHostsFile=none",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "LogLevel=ERROR",
        f"IdentityFile={access.key}",
    ):
        argv += ["-o", option]
    if not access.address:
        command = shlex.join(
            [sys.executable, "-m", "banger.cli.entry", "internal", "agent-proxy", name, "22"]
        ).replace("%", "%%")
        argv += ["-o", f"ProxyCommand={command}"]
    if words and os.isatty(0) and os.isatty(1):
        argv.append("-t")
    argv += ["-p", str(access.port), f"root@{access.address or name + '.vm'}"]
    if words:
        # ssh joins its words with blanks: several are quoted, one is a line for the shell.
        argv += ["--", words[0] if len(words) == 1 else shlex.join(words)]
    return run_attached(argv)
