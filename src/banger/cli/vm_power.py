"""`banger vm start, stop, restart, kill, delete, prune`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.cli.complete import VM
from banger.cli.draw import print_json, progress, quiet_option, table, verbose_option
from banger.cli.errors import warn
from banger.cli.many import each, json_option
from banger.cli.server import Server
from banger.cli.sizing import Duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from banger.cli.guest_command import GuestCommand

_vms = click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VM)


def _tell(verb: str) -> Callable[[r.Outcome], None]:
    def tell(outcome: r.Outcome) -> None:
        sys.stdout.write(f"{outcome.vm.name} {outcome.vm.state if not verb else verb}\n")
        if outcome.note:
            warn(outcome.note)

    return tell


def _stream(method: str, vms: tuple[str, ...], verb: str, o: dict[str, Any]) -> int:
    server = Server()
    # Several machines at once would fight over one line of the terminal.
    with progress(quiet=o["quiet"] or len(set(vms)) > 1, verbose=o["verbose"]) as painter:

        def action(ref: str) -> r.Outcome:
            params = p.StartVm(vm=ref, allow_overcommit=o["allow_overcommit"])
            with server.stream(method, params, painter) as call:
                return call.result(r.Outcome)

        return each(vms, action, _tell(verb), as_json=o["as_json"])


@click.command()
@_vms
@click.option("--allow-overcommit", is_flag=True, help="Start although the memory budget says no.")
@json_option
@quiet_option
@verbose_option
@click.pass_obj
def start(guest: GuestCommand, /, vms: tuple[str, ...], **o: Any) -> int:
    """Start VMs and wait until they are ready."""
    guest.refuse()
    return _stream("vm.start", vms, "running", o)


@click.command()
@_vms
@click.option("--allow-overcommit", is_flag=True, help="Start although the memory budget says no.")
@json_option
@quiet_option
@verbose_option
@click.pass_obj
def restart(guest: GuestCommand, /, vms: tuple[str, ...], **o: Any) -> int:
    """Stop VMs in order and start them again."""
    guest.refuse()
    return _stream("vm.restart", vms, "restarted", o)


@click.command()
@_vms
@click.option(
    "--timeout", type=Duration(), help="Time for the guest to stop by itself [stop_timeout]."
)
@json_option
@click.pass_obj
def stop(guest: GuestCommand, vms: tuple[str, ...], timeout: float | None, as_json: bool) -> int:
    """Stop VMs in order: services stopped, data on disk, disks kept."""
    guest.refuse()
    server = Server()
    return each(
        vms,
        lambda ref: server.call("vm.stop", p.StopVm(vm=ref, timeout_s=timeout), r.Outcome),
        _tell("stopped"),
        as_json=as_json,
    )


@click.command()
@_vms
@click.option(
    "--signal", "signal_name", default="KILL", show_default=True, help="Signal for the VMM."
)
@json_option
@click.pass_obj
def kill(guest: GuestCommand, vms: tuple[str, ...], signal_name: str, as_json: bool) -> int:
    """End VMs at once; what the guest had not written to disk is lost."""
    guest.refuse()
    server = Server()
    return each(
        vms,
        lambda ref: server.call("vm.kill", p.KillVm(vm=ref, signal=signal_name), r.Outcome),
        _tell("stopped"),
        as_json=as_json,
    )


def _deleted(result: r.Deleted) -> None:
    sys.stdout.write(f"{result.name} deleted\n")
    if result.note:
        warn(result.note)


@click.command()
@_vms
@json_option
@click.pass_obj
def delete(guest: GuestCommand, vms: tuple[str, ...], as_json: bool) -> int:
    """Stop VMs and remove their disks and records."""
    guest.refuse()
    return _delete(Server(), vms, as_json=as_json)


def _delete(server: Server, refs: Sequence[str], *, as_json: bool) -> int:
    status = each(
        refs,
        lambda ref: server.call("vm.delete", p.VmRef(vm=ref), r.Deleted),
        _deleted,
        as_json=as_json,
    )
    if server.paths.owner_known_hosts != server.paths.known_hosts:
        from banger.cli.ssh_config import refresh_or_warn

        refresh_or_warn(server.paths)
    return status


@click.command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def prune(guest: GuestCommand, force: bool, as_json: bool) -> int:
    """Delete every VM that is not running or suspended."""
    guest.refuse()
    server = Server()
    idle = [
        vm
        for vm in server.call("vm.list", p.Empty(), list[VmRecord])
        if vm.state not in ("running", "suspended")
    ]
    if not idle:
        warn("there is nothing to prune")
        if as_json:
            print_json([])
        return 0
    sys.stderr.write(
        table(
            ("NAME", "STATE", "IMAGE", "CREATED"),
            [(v.name, v.state, v.image, v.created_at) for v in idle],
        )
    )
    if not force:
        what = (
            "this VM and its disks" if len(idle) == 1 else f"these {len(idle)} VMs and their disks"
        )
        click.confirm(f"Delete {what}?", abort=True, err=True)
    return _delete(server, [vm.id for vm in idle], as_json=as_json)
