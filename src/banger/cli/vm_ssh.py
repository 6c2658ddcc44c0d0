"""`banger vm ssh`: OpenSSH into a guest whose key is known before the first contact.

What ssh itself has to say goes to a file in memory, so that a failure of ssh is told from the guest
command's own status, and a host key that is not the VM's is an error of its own.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.cli import guest_run
from banger.cli.complete import VM
from banger.cli.errors import warn
from banger.cli.server import Server
from banger.errors import BangerError

if TYPE_CHECKING:
    from pathlib import Path

    from banger.cli.guest_command import GuestCommand

_SSH_FAILED = 255
_MOST_WORDS = 64 << 10


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
            from banger.cli.ssh_config import refresh

            refresh(server.paths)
            return _run(access, server.paths.owner_known_hosts, guest.argv or ())
        agent, sock = server.call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
        words = guest.argv or ()
        argv = ("sh", "-c", words[0]) if len(words) == 1 else words
        with sock:
            return guest_run.run(sock, agent, argv=argv, env={}, user=None, want_tty=True)
    finally:
        if guest.argv is None:
            warn(f"VM {name} still runs; stop it with: banger vm stop {name}")


def build_argv(
    access: r.SshAccess, known_hosts: Path, words: tuple[str, ...], *, log: str, tty: bool
) -> list[str]:
    """The command line of ssh, after its name. `log`: a file for what ssh itself says."""
    name = access.vm.name
    argv = ["-F", "none", "-E", log]
    for option in (
        f"HostKeyAlias={name}.vm",
        f'UserKnownHostsFile="{str(known_hosts).replace("%", "%%")}"',
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "UpdateHostKeys=no",
        "IdentitiesOnly=yes",
        "PreferredAuthentications=publickey",
        f'IdentityFile="{access.key.replace("%", "%%")}"',
    ):
        argv += ["-o", option]
    if not access.address:
        from banger.config.program import module_command

        proxy = [*module_command("banger.cli.entry"), "internal", "agent-proxy", name, "22"]
        argv += ["-o", f"ProxyCommand={shlex.join(proxy).replace('%', '%%')}"]
    if words and tty:
        argv.append("-t")
    argv += ["-p", str(access.port), f"root@{access.address or name + '.vm'}"]
    if words:
        # ssh joins its words with blanks: several are quoted, one is a line for the shell.
        argv += ["--", words[0] if len(words) == 1 else shlex.join(words)]
    return argv


def _run(access: r.SshAccess, known_hosts: Path, words: tuple[str, ...]) -> int:
    from banger.process import get_program, run_attached

    program = get_program("ssh", package="openssh-client")
    fd = os.memfd_create("ssh-log")
    try:
        log = f"/proc/{os.getpid()}/fd/{fd}"
        tty = os.isatty(0) and os.isatty(1)
        status = run_attached([program, *build_argv(access, known_hosts, words, log=log, tty=tty)])
        said = os.pread(fd, _MOST_WORDS, 0).decode(errors="replace")
    finally:
        os.close(fd)
    if status == _SSH_FAILED and (error := explain(access.vm.name, said)) is not None:
        raise error
    return status


def explain(name: str, said: str) -> BangerError | None:
    """Why ssh itself failed; None where 255 was the guest command's own status."""
    lines = [
        line.strip()
        for line in said.splitlines()
        # The goodbye of every session on a terminal.
        if line.strip() and not re.fullmatch(r"Connection to \S+ closed\.", line.strip())
    ]
    if not lines:
        return None
    if any("Host key verification failed" in line for line in lines):
        return BangerError(
            "operation_failed",
            f"logging in to VM {name}: its ssh host key is not the one that banger gave it",
            hint=f"banger vm restart {name}",
            reason="host_key_mismatch",
        )
    return BangerError(
        "operation_failed",
        f"logging in to VM {name}: {lines[-1]}",
        hint=f"banger vm exec {name} -- ps ax",
    )
