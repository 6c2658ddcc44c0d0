"""systemd as `banger system` uses it: every question and order is one call of systemctl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT
from banger.errors import BangerError
from banger.process import ProcessFailed, find_program, run

if TYPE_CHECKING:
    from banger.config.system_paths import SystemPaths

# In the order in which they start; they stop the other way round.
UNITS = (HELPER_UNIT, DAEMON_UNIT)
# The parent of the scopes that machines run in; it stays when the last of them has gone.
_SLICE = "banger.slice"
# Longer than any TimeoutStartSec= or TimeoutStopSec= of our units together.
_DEADLINE_S = 300.0


def require_systemd(system: SystemPaths) -> None:
    """Refuse a host that systemd does not run.

    Raises:
        BangerError: unsupported.
    """
    if find_program("systemctl") is None or not system.systemd.is_dir():
        raise BangerError(
            "operation_failed",
            "a system installation is two systemd services, and systemd does not run this host; "
            "banger works here without one",
            hint="BANGER_MODE=user banger vm run",
            reason="unsupported",
        )


def systemctl(*words: str) -> None:
    """One order; returns when it is carried out.

    Raises:
        BangerError: systemctl failed; the hint shows the journal of the unit.
    """
    try:
        run(["systemctl", *words], timeout_s=_DEADLINE_S)
    except ProcessFailed as e:
        unit = next((word for word in reversed(words) if word.endswith(".service")), None)
        raise BangerError(
            "operation_failed",
            f"systemctl {' '.join(words)}: {e.stderr or e}",
            hint=f"journalctl -n 50 -u {unit}" if unit else "systemctl status",
        ) from e


def ask_state(unit: str) -> str:
    """`active`, `inactive`, `failed`, … as `systemctl is-active` says it."""
    done = run(["systemctl", "is-active", unit], check=False, timeout_s=_DEADLINE_S)
    return done.stdout.decode(errors="replace").strip() or "unknown"


def restart_services() -> None:
    """Restart both, the helper first; returns when both say that they are ready.

    Raises:
        BangerError: as `systemctl`.
    """
    for unit in UNITS:
        systemctl("restart", unit)


def stop_services() -> None:
    """Stop both and take them out of the boot; units that are not there are fine.

    Raises:
        BangerError: as `systemctl`.
    """
    for unit in reversed(UNITS):
        if ask_state(unit) in ("active", "activating", "reloading", "deactivating"):
            systemctl("stop", unit)


def forget_units() -> None:
    """After their files are gone: have systemd forget the units, and the slice of the VMs.

    Raises:
        BangerError: as `systemctl`.
    """
    if ask_state(_SLICE) == "active":
        systemctl("stop", _SLICE)
    systemctl("daemon-reload")
    # A service that ended badly is remembered; one that did not is no failure to reset.
    run(["systemctl", "reset-failed", *UNITS], check=False, timeout_s=_DEADLINE_S)
