"""The names of running VMs: answered by our own server, and the system's resolver pointed at it.

Names live in memory and are published anew when a daemon starts. Without the port, or without
systemd-resolved, VMs run as ever; why names do not resolve is kept for `daemon status`.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from banger.dns.server import NameServer
from banger.dns.zone import DOMAIN, Zone
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.config.settings import Settings
    from banger.host.host import Host

log = logging.getLogger(__name__)

_CLEAR_S = 5.0


class Names:
    """What `vm.start` and cleanup publish to. Use it from one event loop."""

    def __init__(self, settings: Settings, host: Host) -> None:
        self.problem: str | None = None
        """Why `.vm` names are not answered; None while they are."""
        self.routing_problem: str | None = None
        """Why the system's resolver does not ask us; None while it does, or nothing is published.
        """
        self.listen: str | None = None
        self._settings = settings
        self._host = host
        self._zone = Zone(settings.subnet)
        self._server = NameServer(self._zone)
        self._names: dict[str, str] = {}
        self._routed: str | None = None
        self._routing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen. A port that is taken is logged, and costs the names only."""
        try:
            address, port = await self._server.start(self._settings.dns_listen_addr)
        except BangerError as e:
            self.problem = str(e)
            log.warning("no .vm names: %s", e)
        else:
            self.listen = f"{address}:{port}"

    def publish(self, vm: VmRecord) -> None:
        """The VM's name has its address from now on; on user networking it has none."""
        if vm.network != "bridge":
            return
        self._names[vm.id] = vm.name
        self._zone.publish(vm.name, vm.address)
        if self.listen is not None and self._host.privilege.kind != "none":
            earlier = self._routing
            self._routing = asyncio.get_running_loop().create_task(self._route(earlier))

    def withdraw(self, vm_id: str) -> None:
        if (name := self._names.pop(vm_id, None)) is not None:
            self._zone.withdraw(name)

    def published(self) -> dict[str, str]:
        """Name and address of every VM that is answered for."""
        return self._zone.names()

    async def close(self) -> None:
        """Nobody asks us any more, and nobody answers."""
        if self._routing is not None:
            await asyncio.wait({self._routing})
        if self._routed is not None:
            try:
                async with asyncio.timeout(_CLEAR_S):
                    await self._host.clear_resolver(self._settings.bridge_name)
            except (BangerError, TimeoutError) as e:
                log.warning("the resolver keeps asking for .vm names: %s", e)
        await self._server.close()

    async def _route(self, earlier: asyncio.Task[None] | None) -> None:
        """Point systemd-resolved at us, once per life of the bridge that it hangs on."""
        if earlier is not None:
            await asyncio.wait({earlier})
        link = self._settings.bridge_name
        index = _link_index(link)
        if index is None or index == self._routed:
            return
        assert self.listen is not None
        domains = (f"~{DOMAIN}", *(f"~{d}" for d in self._zone.reverse_domains()))
        try:
            await self._host.set_resolver(link, self.listen, domains)
        except BangerError as e:
            if self.routing_problem is None:
                log.warning("the system's resolver does not ask for .vm names: %s", e)
            self.routing_problem = str(e)
        else:
            self._routed, self.routing_problem = index, None


def _link_index(name: str) -> str | None:
    try:
        return (Path("/sys/class/net") / name / "ifindex").read_text(encoding="ascii").strip()
    except OSError:
        return None
