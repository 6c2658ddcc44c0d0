"""Calls to the installed root helper from `banger system`, which is root or the owner itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec

from banger.errors import BangerError
from banger.host.host import Host
from banger.host.lease import Bridge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from banger.config.system_paths import SystemPaths
    from banger.host.lease import HostStatus

T = TypeVar("T")


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """What a helper gave back: ids of leases, names of bridges; and what it could not."""

    leases: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def ask_helper(system: SystemPaths) -> HostStatus:
    """The helper's status.

    Raises:
        BangerError: it does not answer, or refuses us.
    """
    return _call(system, lambda host: host.status())


def release_all(system: SystemPaths) -> Released:
    """Give back every lease, killing what is still alive in it, and the taps in store.

    Raises:
        BangerError: the helper does not answer.
    """

    async def work(host: Host) -> Released:
        status = await host.status()
        done: list[str] = []
        failures: list[str] = []
        for lease in status.leases:
            try:
                await host.release(lease.id)
                done.append(lease.id)
            except BangerError as e:
                failures.append(str(e))
        try:
            for bridge in status.bridges:
                # With no taps to be kept in store, those that are there go.
                await host.sweep(
                    Bridge(name=bridge.name, address=bridge.address, prefix=bridge.prefix)
                )
            await host.sweep()
        except BangerError as e:
            failures.append(str(e))
        return Released(
            leases=tuple(done),
            bridges=tuple(bridge.name for bridge in status.bridges),
            failures=tuple(failures),
        )

    return _call(system, work)


def _call(system: SystemPaths, work: Callable[[Host], Awaitable[T]]) -> T:
    async def run() -> T:
        host = Host.open_service(system.helper_socket, jail_base=system.jails, pool_size=0)
        try:
            return await work(host)
        finally:
            await host.aclose()

    return asyncio.run(run())
