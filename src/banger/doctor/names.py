"""Checks of `.vm` names: who answers on our port, and whether the system's resolver asks it."""

from __future__ import annotations

import secrets
import socket
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from banger.dns.message import (
    IN,
    RD,
    A,
    FormatError,
    Message,
    Question,
    encode_name,
    format_message,
    parse_message,
)
from banger.dns.server import parse_listen
from banger.doctor.check import Check, Finding, failed, passed, warned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.doctor.world import World

# Answered whether a VM runs or not (spec 6.5).
_OWN_NAME = "ns.vm"
_ANSWER_S = 3.0
_DATAGRAM = 4096
_ROUTING = "other resolvers: docs/dns-routing.md"


def _look_port(world: World) -> Iterator[Finding]:
    listen, daemon = world.settings.dns_listen_addr, world.daemon().facts
    edit = f"$EDITOR {world.config_files[-1]}"
    if daemon is not None and daemon.dns is not None:
        if ask_name(daemon.dns, _OWN_NAME) is None:
            yield failed(
                f"the daemon listens on {daemon.dns}, and gives no answer for {_OWN_NAME}",
                command=_restart(world),
            )
        else:
            yield passed(f"the daemon answers for .vm on {daemon.dns}")
    elif daemon is not None:
        yield warned(
            f"VMs have no names: {daemon.dns_problem or 'the daemon does not listen'}",
            f"set dns_listen_addr to another port than {listen}, then: {_restart(world)}",
            command=edit,
        )
    elif _is_free(listen):
        yield passed(f"{listen} is free; the daemon takes it when it starts")
    elif ask_name(listen, _OWN_NAME) is not None:
        yield warned(
            f"another banger answers for .vm on {listen}: this one's VMs have no names",
            "set dns_listen_addr to another port",
            command=edit,
        )
    else:
        yield warned(
            f"another program holds {listen}: VMs will have no names",
            f"find it: sudo ss -lunp sport = :{listen.rpartition(':')[2]}; or set dns_listen_addr "
            "to another port",
            command=edit,
        )


def _is_free(listen: str) -> bool:
    address, port = parse_listen(listen)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), port))
        except OSError:
            return False
    return True


def ask_name(listen: str, name: str) -> str | None:
    """The address that the server at `listen` has for a name; None without an answer."""
    address, port = parse_listen(listen)
    question = Question(name=encode_name(name), rtype=A, rclass=IN)
    query = Message(id=secrets.randbelow(1 << 16), flags=RD, questions=(question,))
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_ANSWER_S)
        try:
            # Connected, so that only this peer's datagrams are heard, and its refusals.
            sock.connect((str(address), port))
            sock.send(format_message(query))
            reply = parse_message(sock.recv(_DATAGRAM))
        except (OSError, FormatError):
            return None
    if reply.id != query.id:
        return None
    found = (record.rdata for record in reply.answers if record.rtype == A)
    return next((str(IPv4Address(data)) for data in found if len(data) == 4), None)


def _look_resolver(world: World) -> Iterator[Finding]:
    daemon = world.daemon().facts
    if daemon is None or daemon.dns is None:
        yield passed("nobody answers for .vm at present, so the resolver was not asked")
        return
    running = [
        vm for vm in world.vms if vm.id in world.live() and vm.network == "bridge" and vm.address
    ]
    name, wanted = (f"{running[0].name}.vm", running[0].address) if running else (_OWN_NAME, None)
    found = {line.split()[0] for line in (world.ask("getent", "ahostsv4", name) or "").splitlines()}
    if found and (wanted is None or wanted in found):
        yield passed(f"this host's own lookup finds {name} ({', '.join(sorted(found))})")
        return
    if found:
        yield warned(
            f"this host's own lookup has {', '.join(sorted(found))} for {name}; it is {wanted}",
            _ROUTING,
            command=f"dig @{_dig(daemon.dns)} {name}",
        )
        return
    if not running and _has_resolved(world):
        yield passed("no VM runs: systemd-resolved is pointed at banger by the first one")
        return
    yield warned(
        f"programs on this host do not find {name}: their resolver does not ask {daemon.dns}",
        *((daemon.routing_problem,) if daemon.routing_problem else ()),
        _ROUTING,
        command=_route(world, daemon.dns),
    )


def _route(world: World, listen: str) -> str:
    """What points this host's resolver at us."""
    host, _, port = listen.rpartition(":")
    if _has_resolved(world):
        link = world.settings.bridge_name
        stub = "/run/systemd/resolve/stub-resolv.conf"
        if "127.0.0.53" not in (world.read("/etc/resolv.conf") or ""):
            return f"sudo ln -sf {stub} /etc/resolv.conf"
        return (
            f"sudo resolvectl dns {link} {listen} && sudo resolvectl domain {link} '~vm' && "
            f"sudo resolvectl default-route {link} no"
        )
    if world.find_program("dnsmasq") is not None:
        return (
            f"echo 'server=/vm/{host}#{port}' | sudo tee /etc/dnsmasq.d/banger.conf && "
            "sudo systemctl restart dnsmasq"
        )
    return "sudo apt-get install systemd-resolved"


def _has_resolved(world: World) -> bool:
    return world.file("/run/systemd/resolve/stub-resolv.conf").exists()


def _dig(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    return f"{host} -p {port}"


def _restart(world: World) -> str:
    return "sudo banger system restart" if world.paths.mode == "system" else "banger daemon stop"


CHECKS = (
    Check(
        name="vm dns",
        look=_look_port,
        needs=("bridge",),
        meaning="the daemon answers for `.vm` on `dns_listen_addr`, or the port is free for it",
        mends="another `dns_listen_addr`, or ending the program that holds the port",
    ),
    Check(
        name="resolver",
        look=_look_resolver,
        needs=("bridge",),
        meaning="a running VM's `<name>.vm` (without one, `ns.vm`) through the system's own "
        "lookup, not only by asking the port",
        mends="the row's command for the resolver of this host; see [dns-routing](dns-routing.md)",
    ),
)
