"""Which banger a command means: this host's system installation or the user's own (spec 1.1)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.paths import Paths
from banger.config.system_paths import SYSTEM
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from banger.config.system_paths import SystemPaths


def choose_paths(
    system: SystemPaths = SYSTEM,
    *,
    uid: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Paths:
    """The paths of the installation that a command of this user talks to.

    Raises:
        BangerError: unauthorized: the host's banger is somebody else's; bad_request: BANGER_MODE
            has another value than `user`; operation_failed: the install record is unreadable.
    """
    mode = environment.get("BANGER_MODE", "")
    if mode not in ("", "user"):
        raise BangerError(
            "bad_request",
            f"BANGER_MODE is {mode!r}; it may be `user` or unset",
            hint="unset BANGER_MODE",
        )
    # One stat in user mode; decoding is loaded only where there is something to decode.
    if mode == "user" or not system.record.exists():
        return Paths.user_mode(system)
    from banger.config.install import read_install_record

    record = read_install_record(system)
    if record is None:
        return Paths.user_mode(system)
    uid = os.geteuid() if uid is None else uid
    if record.uid != uid:
        raise BangerError(
            "unauthorized",
            f"banger is installed on this host for {record.owner} (uid {record.uid}), you are "
            f"uid {uid}; BANGER_MODE=user gives you one of your own",
            hint="BANGER_MODE=user banger vm list",
        )
    return Paths.system_mode(system, Path(record.home))
