"""Hidden commands that banger itself, or a program it starts, calls."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any

import click
import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.api.base import Params
from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.cli.complete import VM
from banger.cli.draw import print_json
from banger.cli.server import Server
from banger.rpc.blocking import BlockingChannel
from banger.rpc.channel import decode_reply

_CHUNK = 64 << 10


@click.command()
@click.argument("vm", type=VM)
@click.argument("port", type=click.IntRange(1, 65535))
def agent_proxy(vm: str, port: int) -> None:
    """Join stdin and stdout to a TCP port inside a guest, through its agent.

    VM may be the host name that an ssh client was given, `web.vm`.
    """
    name = vm.removesuffix(".vm")
    access, sock = Server().call_with_fd("vm.connect", p.VmRef(vm=name), r.AgentAccess)
    channel = BlockingChannel(sock)
    request = Request(
        version=PROTOCOL_VERSION,
        method="dial",
        params=msgspec.Raw(msgspec.json.encode({"port": port})),
        token=access.token,
    )
    channel.write_document(request)
    decode_reply(channel.read_line(), f"reaching port {port} in VM {access.vm.name}")
    threading.Thread(target=_upwards, args=(sock,), daemon=True).start()
    rest = channel.take_buffered()
    while rest or (rest := sock.recv(_CHUNK)):
        sys.stdout.buffer.write(rest)
        sys.stdout.buffer.flush()
        rest = b""


def _upwards(sock: socket.socket) -> None:
    try:
        while data := os.read(0, _CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the other direction ends the program


@click.command()
def rpc_schema() -> None:
    """Print the JSON schema of the parameters of the daemon's methods."""
    import importlib
    import pkgutil

    import banger.api

    modules = [
        importlib.import_module(f"banger.api.{m.name}")
        for m in pkgutil.iter_modules(banger.api.__path__)
    ]
    found = {
        kind.__name__: kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Params) and kind is not Params
    }
    kinds: list[Any] = list(found.values())
    schemas, components = msgspec.json.schema_components(kinds)
    names = [kind.__name__ for kind in kinds]
    print_json({"params": dict(zip(names, schemas, strict=True)), "components": components})
