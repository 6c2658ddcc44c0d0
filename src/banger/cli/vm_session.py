"""`banger vm session start, list, show, stop, kill, remove`: commands that outlive a connection."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import click

from banger.api import params as p
from banger.api import results as r
from banger.api import sessions as s
from banger.cli.complete import SESSION, VM
from banger.cli.draw import always_json, print_json, table
from banger.cli.server import Server
from banger.cli.sizing import Duration
from banger.cli.vm_run import parse_env
from banger.units import format_size

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_COMMAND_WIDTH = 40

vm_argument = click.argument("vm", type=VM)
session_argument = click.argument("session", metavar="NAME", type=SESSION)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")


@click.command()
@vm_argument
@click.option("--name", required=True, help="Name of the session, unique in its VM.")
@click.option("--cwd", metavar="DIR", help="Directory to run in [the workspace, else home].")
@click.option("--env", metavar="K=V", multiple=True, help="Environment; repeatable.")
@click.option("--user", help="User in the guest [root].")
@click.option("--tag", "tags", multiple=True, help="A word to find it by; repeatable.")
@click.option(
    "--stdin-mode",
    type=click.Choice(["detached", "pipe"]),
    help="pipe: input comes from attach and send [detached; pipe with -t].",
)
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--require-command", "require", metavar="CMD", multiple=True, help="Must be there; repeatable."
)
@json_option
@click.pass_obj
def start(
    guest: GuestCommand,
    vm: str,
    name: str,
    cwd: str | None,
    env: tuple[str, ...],
    user: str | None,
    tags: tuple[str, ...],
    stdin_mode: s.StdinMode | None,
    tty: bool,
    require: tuple[str, ...],
    as_json: bool,
) -> None:
    """Start a command that goes on when this one ends.

    \b
    banger vm session start web --name dev -- npm run dev
    banger vm session start web --name repl -t -- python3
    """
    from banger.cli.stream import terminal_size

    argv = guest.required()
    if tty and stdin_mode == "detached":
        raise click.UsageError("-t needs an input: leave out --stdin-mode detached")
    size = terminal_size() if tty else None
    params = s.StartSession(
        vm=vm,
        name=name,
        argv=argv,
        cwd=cwd,
        env=parse_env(env),
        user=user,
        stdin_mode=stdin_mode or ("pipe" if tty else "detached"),
        tty=s.TerminalSize(rows=size[0], cols=size[1]) if size else None,
        require=require,
        tags=tags,
    )
    session = Server().call("vm.session.start", params, s.Session)
    if as_json:
        print_json(session)
    else:
        sys.stdout.write(f"{session.name}\n")


@click.command(name="list")
@vm_argument
@click.option("--tag", "tags", multiple=True, help="Only those with all of these tags.")
@click.option("--names", is_flag=True, help="Names only, one a line.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.pass_obj
def list_sessions(
    guest: GuestCommand, vm: str, tags: tuple[str, ...], names: bool, as_json: bool
) -> None:
    """List the sessions of a VM, oldest first."""
    guest.refuse()
    sessions = Server().call("vm.session.list", p.VmRef(vm=vm), list[s.Session])
    sessions = [x for x in sessions if set(tags) <= set(x.tags)]
    if as_json:
        print_json(sessions)
    elif names:
        sys.stdout.writelines(f"{x.name}\n" for x in sessions)
    else:
        rows = [(x.name, _state(x), str(x.pid or "-"), _shown(x), x.created_at) for x in sessions]
        sys.stdout.write(table(("NAME", "STATE", "PID", "COMMAND", "CREATED"), rows))


def _state(session: s.Session) -> str:
    if session.state == "exited":
        how = session.signal if session.signal is not None else session.code
        return f"exited ({how})"
    return f"{session.state} (attached)" if session.attached else session.state


def _shown(session: s.Session) -> str:
    text = shlex.join(session.argv)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _COMMAND_WIDTH else text[: _COMMAND_WIDTH - 1] + "…"


@click.command()
@vm_argument
@session_argument
@always_json
@click.pass_obj
def show(guest: GuestCommand, vm: str, session: str) -> None:
    """Show one session as JSON, with what is kept of its output."""
    guest.refuse()
    params = s.SessionRef(vm=vm, session=session)
    print_json(Server().call("vm.session.show", params, s.Session))


@click.command()
@vm_argument
@session_argument
@click.option("--timeout", type=Duration(), default="10s", help="Time before KILL [10s].")
@json_option
@click.pass_obj
def stop(guest: GuestCommand, vm: str, session: str, timeout: float, as_json: bool) -> None:
    """End a session in order: TERM to its processes, KILL when they do not end in time."""
    guest.refuse()
    params = s.StopSession(vm=vm, session=session, timeout_s=timeout)
    _tell(Server().call("vm.session.stop", params, s.Session), as_json=as_json)


@click.command()
@vm_argument
@session_argument
@click.option("--signal", default="KILL", help="Signal by name [KILL].")
@json_option
@click.pass_obj
def kill(guest: GuestCommand, vm: str, session: str, signal: str, as_json: bool) -> None:
    """Send a signal to a session's processes."""
    guest.refuse()
    params = s.KillSession(vm=vm, session=session, signal=signal)
    _tell(Server().call("vm.session.kill", params, s.Session), as_json=as_json)


@click.command()
@vm_argument
@session_argument
@click.pass_obj
def remove(guest: GuestCommand, vm: str, session: str) -> None:
    """Forget a session that has ended, with its output."""
    guest.refuse()
    params = s.SessionRef(vm=vm, session=session)
    done = Server().call("vm.session.remove", params, r.Deleted)
    sys.stdout.write(f"{done.name} removed\n")


def _tell(session: s.Session, *, as_json: bool) -> None:
    if as_json:
        print_json(session)
    else:
        sys.stdout.write(f"{session.name} {_state(session)}\n")


def format_dropped(count: int) -> str:
    """What is said of output that was too old to be kept."""
    return f"{format_size(count) if count >= 1024 else f'{count} bytes'} of older output dropped"
