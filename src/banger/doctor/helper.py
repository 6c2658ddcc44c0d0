"""What the root helper says of itself; asked by the daemon, or by us where none runs."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from banger.api.doctor import DoctorLease, DoctorObstacle, HelperFacts
from banger.errors import BangerError
from banger.host.host import Host

if TYPE_CHECKING:
    from banger.config.paths import Paths


async def ask_helper(host: Host) -> HelperFacts:
    """The helper's status as facts. A helper that fails to answer is a fact too."""
    privilege = host.privilege
    if privilege.kind == "none":
        return HelperFacts(privilege="none", problem=privilege.missing, hint=privilege.hint)
    try:
        status = await host.status()
    except BangerError as e:
        return HelperFacts(privilege=privilege.kind, problem=str(e), hint=e.hint)
    return HelperFacts(
        privilege=privilege.kind,
        version=status.version,
        leases=tuple(
            DoctorLease(
                id=lease.id,
                vm_id=lease.vm_id,
                tap=lease.tap,
                address=lease.address,
                bridge=lease.bridge,
                state=lease.state,
            )
            for lease in status.leases
        ),
        obstacles=tuple(
            DoctorObstacle(
                family=o.family, table=o.table, chain=o.chain, why=o.why, command=o.command
            )
            for o in status.obstacles
        ),
        ledger_problems=status.problems,
    )


def ask_helper_directly(paths: Paths) -> HelperFacts:
    """As `ask_helper`, from a process without a daemon. Blocks; not for use on an event loop.

    The helper is a child of ours in user mode and ends with the call.
    """

    async def ask(ledger: Path) -> HelperFacts:
        try:
            host = await _open(paths, ledger)
        except BangerError as e:  # an incomplete installation
            return HelperFacts(privilege="none", problem=str(e), hint=e.hint)
        try:
            return await ask_helper(host)
        finally:
            await host.aclose()

    if paths.mode == "system" or paths.leases.exists():
        return asyncio.run(ask(paths.leases))
    # The helper makes its ledger where there is none; looking must leave nothing behind.
    with tempfile.TemporaryDirectory(prefix="banger-doctor-") as place:
        facts = asyncio.run(ask(Path(place) / "leases"))
        with contextlib.suppress(FileNotFoundError):
            Path(place, "leases").rmdir()  # root's, and empty
        return facts


async def _open(paths: Paths, ledger: Path) -> Host:
    if paths.mode == "system":
        # Asked for its status only: what it keeps in store is the daemon's to say.
        return Host.open_service(
            paths.system.helper_socket, jail_base=paths.system.jails, pool_size=0
        )
    log = paths.state / "banger-root.log"
    return await Host.open(ledger=ledger, log=log if log.exists() else Path("/dev/null"))
