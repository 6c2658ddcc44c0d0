"""Files that ship with banger: guest agent binaries, image recipes, the root helper's program.

In a wheel they are package data; in a checkout they lie beside `src/` (`build/agent`, `recipes`).
"""

from __future__ import annotations

import functools
from pathlib import Path

from banger.errors import BangerError

_PACKAGE = Path(__file__).resolve().parent.parent
_CHECKOUT = _PACKAGE.parent.parent


def agent_binary(arch: str = "amd64") -> Path:
    """The guest agent for `arch` (amd64 or arm64).

    Raises:
        BangerError: not_found: a checkout in which it was not built yet.
    """
    name = f"banger-vsock-agent-{arch}"
    for path in (_PACKAGE / "agent" / name, _CHECKOUT / "build" / "agent" / name):
        if path.is_file():
            return path
    raise BangerError(
        "not_found", f"the guest agent {name} is not installed here", hint="make agent"
    )


@functools.cache
def agent_sha256(arch: str = "amd64") -> str:
    """What the agent's identity is recorded as in kernel entries."""
    from banger.files import sha256_file

    return sha256_file(agent_binary(arch))


def recipes_directory() -> Path:
    """The directory of `*.toml` image recipes and what they refer to."""
    shipped = _PACKAGE / "recipes"
    return shipped if shipped.is_dir() else _CHECKOUT / "recipes"


def helper_program() -> Path:
    """The root helper, a directory or zipapp that `/usr/bin/python3 -I -S` runs."""
    return _PACKAGE.parent / "banger_root"
