"""The two systemd units: texts in `units/`, filled in with what this installation is.

Source: systemd.service(5), systemd.exec(5).
"""

from __future__ import annotations

import grp
import string
from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.config.install import InstallRecord
    from banger.config.system_paths import SystemPaths

_TEMPLATES = Path(__file__).with_name("units")


def build_units(
    system: SystemPaths, record: InstallRecord, release: Path, jails: Path
) -> dict[Path, bytes]:
    """File → content of both units, for a release's own directory and a jail base.

    They name the release, not the link to it: what systemd restarts is what it started.

    Raises:
        BangerError: bad_request: a path that a unit cannot name.
    """
    words = {
        "owner": "".join(c if _is_plain(f"/{c}") else "?" for c in record.owner),
        "uid": str(record.uid),
        "gid": str(record.gid),
        "groups": "SupplementaryGroups=kvm" if _has_group("kvm") else "SupplementaryGroups=",
        "bangerd": release / "bin/bangerd",
        "helper": release / "banger-root.pyz",
        "environment": system.environment,
        "socket": system.helper_socket,
        "ledger": system.ledger,
        "state": system.state,
        "cache": system.cache,
        "runtime": system.runtime,
        "helper_state": system.helper_state,
        "jails": jails,
    }
    for value in words.values():
        # A unit is lines of words with specifiers: nothing in it may mean more than itself.
        if isinstance(value, Path) and not _is_plain(str(value)):
            raise BangerError(
                "bad_request",
                f"writing the units: the path {value} has characters that systemd would take "
                "for something else",
                hint=f"$EDITOR {system.config_file}",
            )
    texts = {key: str(value) for key, value in words.items()}
    return {
        system.units / name: string.Template((_TEMPLATES / name).read_text(encoding="ascii"))
        .substitute(texts)
        .encode()
        for name in (DAEMON_UNIT, HELPER_UNIT)
    }


def _is_plain(path: str) -> bool:
    return path.startswith("/") and all(c.isalnum() or c in "/._+-@" for c in path)


def _has_group(name: str) -> bool:
    # A unit that names a group that is not there does not start.
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True
