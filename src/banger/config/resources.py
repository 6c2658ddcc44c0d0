"""Files that ship with banger: guest agent binaries and image recipes.

In a wheel they are package data; in a checkout they lie beside `src/` (`build/agent`, `recipes`).
"""

from __future__ import annotations

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


def recipes_directory() -> Path:
    """The directory of `*.toml` image recipes and what they refer to."""
    shipped = _PACKAGE / "recipes"
    return shipped if shipped.is_dir() else _CHECKOUT / "recipes"
