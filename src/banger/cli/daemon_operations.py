"""`banger daemon operations`: what the daemon does now, and how what it did ended."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from banger.api import operations as o
from banger.api import params as p
from banger.cli.complete import OPERATION
from banger.cli.draw import print_json, progress, quiet_option, table
from banger.cli.errors import show_error
from banger.cli.server import Server

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_operation = click.argument("operation", metavar="OPERATION", type=OPERATION)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command(name="list")
@json_option
@click.pass_obj
def list_operations(guest: GuestCommand, as_json: bool) -> None:
    """List what is under way, and what ended in the last ten minutes."""
    guest.refuse()
    rows = Server().call("daemon.operations.list", p.Empty(), list[o.Operation])
    if as_json:
        print_json(rows)
        return
    headers = ("OPERATION", "KIND", "TARGET", "STATE", "STAGE", "STARTED")
    sys.stdout.write(
        table(
            headers,
            [
                (
                    row.id,
                    row.kind,
                    row.target or "-",
                    row.state,
                    row.stage or "-",
                    row.started_at[:19].replace("T", " "),
                )
                for row in rows
            ],
        )
    )


@click.command()
@_operation
@json_option
@quiet_option
@click.pass_obj
def show(guest: GuestCommand, operation: str, as_json: bool, quiet: bool) -> int:
    """Watch an operation to its end, and tell how it ended.

    The exit status is 0 when it was done, and 1 when it failed or nobody knows.
    """
    guest.refuse()
    with (
        progress(quiet=quiet) as painter,
        Server().stream("daemon.operations.show", o.OperationRef(id=operation), painter) as call,
    ):
        return _tell(call.result(o.Operation), as_json=as_json)


@click.command()
@_operation
@json_option
@click.pass_obj
def cancel(guest: GuestCommand, operation: str, as_json: bool) -> int:
    """Cancel an operation, and wait until what it had made is given back."""
    guest.refuse()
    ended = Server().call("daemon.operations.cancel", o.OperationRef(id=operation), o.Operation)
    cancelled = ended.error is not None and ended.error.reason == "cancelled"
    return 0 if _tell(ended, as_json=as_json) == 0 or cancelled else 1


def _tell(ended: o.Operation, *, as_json: bool) -> int:
    if as_json:
        print_json(ended)
    else:
        about = f" {ended.target}" if ended.target else ""
        sys.stdout.write(f"{ended.kind}{about}: {ended.state}\n")
        if ended.error is not None:
            show_error(ended.error.exception(), as_json=False)
    return 0 if ended.state == "done" else 1
