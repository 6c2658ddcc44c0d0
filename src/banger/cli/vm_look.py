"""`banger vm list, show, logs, stats, ports, health, ping`: looking, changing nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.cli.complete import VM
from banger.cli.draw import always_json, print_json, table
from banger.cli.errors import harmless, warn
from banger.cli.server import Server
from banger.units import format_size

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_vm = click.argument("vm", type=VM)
_vms = click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VM)


@click.command(name="list")
@click.option("--names", is_flag=True, help="Names only, one a line.")
@_json
@click.pass_obj
def list_vms(guest: GuestCommand, names: bool, as_json: bool) -> None:
    """List VMs."""
    guest.refuse()
    vms = Server().call("vm.list", p.Empty(), list[VmRecord])
    if as_json:
        print_json(vms)
    elif names:
        sys.stdout.writelines(f"{vm.name}\n" for vm in vms)
    else:
        rows = [
            (
                vm.name,
                f"{vm.state} (paused)" if vm.paused else vm.state,
                vm.image,
                vm.address or "-",
                str(vm.vcpu),
                f"{vm.memory_mib}M",
                format_size(vm.work_disk_bytes),
                vm.workspace.guest_path if vm.workspace else "-",
                vm.created_at[:19].replace("T", " "),
            )
            for vm in vms
        ]
        headers = (
            "NAME", "STATE", "IMAGE", "ADDRESS", "VCPU", "MEMORY", "DISK", "WORKSPACE", "CREATED",
        )  # fmt: skip
        sys.stdout.write(table(headers, rows))
        for vm in vms:
            if vm.paused:
                warn(f"warning: VM {vm.name} is paused: {vm.paused}")
        for warning in sorted({vm.warning for vm in vms if vm.warning}):
            warn(f"warning: {warning}\nhint: banger vm prune")


@click.command()
@_vm
@always_json
@click.pass_obj
def show(guest: GuestCommand, vm: str) -> None:
    """Show one VM's record as JSON."""
    guest.refuse()
    print_json(Server().call("vm.show", p.VmRef(vm=vm), VmRecord))


@click.command()
@_vm
@click.option("-f", "--follow", is_flag=True, help="Go on until the VM ends.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.pass_obj
def logs(guest: GuestCommand, vm: str, follow: bool, tail: int | None) -> None:
    """Show a guest's console; works on a stopped VM too."""
    guest.refuse()
    params = p.VmLogs(vm=vm, follow=follow, tail=tail)
    with Server().stream("vm.logs", params, lambda event: None) as call:
        for chunk in call.frames():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def _each_json(method: str, vms: tuple[str, ...], kind: Any) -> int:
    from banger.cli.many import each

    server = Server()
    rows: list[Any] = []
    status = each(vms, lambda ref: server.call(method, p.VmRef(vm=ref), kind), rows.append)
    print_json(rows)
    return status


@click.command()
@_vms
@always_json
@click.pass_obj
def stats(guest: GuestCommand, vms: tuple[str, ...]) -> int:
    """Show figures of running VMs as JSON: processor, memory, disks, network, guest."""
    guest.refuse()
    return _each_json("vm.stats", vms, r.VmStats)


@click.command()
@_vms
@_json
@click.pass_obj
def ports(guest: GuestCommand, vms: tuple[str, ...], as_json: bool) -> int:
    """Show what listens inside running VMs, and where it is reached from this host.

    What only the guest itself reaches is marked, with what to do about it.
    """
    guest.refuse()
    from banger.cli.many import each

    server = Server()
    found: list[r.PortRow] = []
    status = each(
        vms, lambda ref: server.call("vm.ports", p.VmRef(vm=ref), list[r.PortRow]), found.extend
    )
    if as_json:
        print_json(found)
    else:
        rows = [
            (
                str(row.port),
                row.proto,
                row.process or "-",
                row.endpoint if row.reachable else f"only in {row.vm}: {row.endpoint}",
                row.link or row.fix or "-",
            )
            for row in found
        ]
        sys.stdout.write(table(("PORT", "PROTO", "PROCESS", "ENDPOINT", "LINK"), rows))
    return status


@click.command()
@_vm
@_json
@click.pass_obj
def health(guest: GuestCommand, vm: str, as_json: bool) -> None:
    """Ask the guest's agent how it is."""
    guest.refuse()
    answer = Server().call("vm.health", p.VmRef(vm=vm), dict[str, Any])
    if as_json:
        print_json(answer)
    else:
        width = max(map(len, answer), default=0)
        lines = (f"{key.ljust(width)}  {value}" for key, value in answer.items())
        sys.stdout.writelines(harmless(line).replace("\n", "?") + "\n" for line in lines)


@click.command()
@_vm
@_json
@click.pass_obj
def ping(guest: GuestCommand, vm: str, as_json: bool) -> None:
    """Measure the round trip to the guest's agent."""
    guest.refuse()
    answer = Server().call("vm.ping", p.VmRef(vm=vm), r.Ping)
    if as_json:
        print_json(answer)
    else:
        sys.stdout.write(f"{answer.vm}: {answer.round_trip_ms} ms\n")
