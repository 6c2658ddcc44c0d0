"""`banger system restart`: both services anew, the VMs as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.config.install import read_install_record
from banger.errors import BangerError
from banger.system.systemd import UNITS, ask_state, require_systemd, restart_services

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.config.system_paths import SystemPaths


def restart(system: SystemPaths, *, say: Callable[[str], None]) -> None:
    """Restart the helper, then the daemon; returns when both are ready.

    Raises:
        BangerError: not_found: there is no system installation; or a service does not start.
    """
    require_systemd(system)
    if read_install_record(system) is None:
        raise BangerError(
            "not_found",
            f"there is no system installation here ({system.record} is missing)",
            hint="sudo banger system install --owner $USER",
        )
    restart_services()
    for unit in UNITS:
        say(f"{unit} is {ask_state(unit)}")
