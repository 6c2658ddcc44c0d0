"""How an error looks: one sentence, the next command, the operation id."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from banger.errors import BangerError


def color() -> bool:
    """Colour only on a terminal, and never under NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def show_error(error: BangerError, *, as_json: bool) -> None:
    """On stderr for people; as an object on stdout where JSON was asked for."""
    if as_json:
        import msgspec

        from banger.api.envelope import WireError

        document = {"error": msgspec.to_builtins(WireError.of(error))}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")
        return
    red, dim, off = ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") if color() else ("", "", "")
    label = "" if error.code == "operation_failed" else f"{error.code.replace('_', ' ')}: "
    op = f" {dim}({error.op_id}){off}" if error.op_id else ""
    sys.stderr.write(f"{red}banger:{off} {label}{error.message}{op}\n")
    for extra in error.also:
        sys.stderr.write(f"  also: {extra}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


def warn(message: str) -> None:
    sys.stderr.write(f"banger: {message}\n")
