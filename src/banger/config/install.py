"""`/etc/banger/install.toml`: whose system installation this is, and what was installed.

Its presence is what makes a host's banger a system installation. Written as a whole by
`banger system install`; everybody may read it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from banger.decoding import MALFORMED, decode_toml
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.config.system_paths import SystemPaths


class InstallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record. `uid` decides who the owner is, the name is for people.

    `commit` and `built_at` are empty where the release was not built from a tag.
    """

    owner: str
    uid: int
    gid: int
    home: str
    installed_at: str
    version: str
    commit: str = ""
    built_at: str = ""


def read_install_record(system: SystemPaths) -> InstallRecord | None:
    """The record of this host's system installation; None where there is none.

    Raises:
        BangerError: operation_failed: it cannot be read or says nothing sensible.
    """
    doing = f"reading the install record {system.record}"
    try:
        return decode_toml(system.record.read_bytes(), type=InstallRecord)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as e:
        raise BangerError(
            "operation_failed",
            f"{doing}: {e}",
            hint="sudo banger system install --owner $USER",
        ) from e


def format_install_record(record: InstallRecord) -> bytes:
    """The record as TOML."""
    lines = ["# Written by banger system install."]
    for name, value in msgspec.to_builtins(record).items():
        # A JSON string in which nothing but what must be is escaped is a TOML basic string.
        text = str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{name} = {text}")
    return ("\n".join(lines) + "\n").encode()
