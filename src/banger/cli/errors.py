"""How an error looks: one sentence, the next command, the operation id; and how words of others
look, which a guest, a registry or a repository may have had a part in."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from banger.errors import BangerError


# The tail of a console is in some messages; more than a screen or two helps nobody.
_MOST_TEXT = 16_384


def color() -> bool:
    """Colour only on a terminal, and never under NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def show_error(error: BangerError, *, as_json: bool) -> None:
    """On stderr for people; as an object on stdout where JSON was asked for."""
    if as_json:
        import msgspec

        sys.stdout.write(harmless_json(msgspec.json.encode(wire_document(error))) + "\n")
        return
    red, dim, off = ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") if color() else ("", "", "")
    label = "" if error.code == "operation_failed" else f"{error.code.replace('_', ' ')}: "
    op = f" {dim}({error.op_id}){off}" if error.op_id else ""
    sys.stderr.write(f"{red}banger:{off} {label}{harmless(error.message)}{op}\n")
    for extra in error.also:
        sys.stderr.write(f"  also: {harmless(extra)}\n")
    if error.hint:
        sys.stderr.write(f"hint: {harmless(error.hint)}\n")


def wire_document(error: BangerError) -> dict[str, Any]:
    """An error as programs read it."""
    import msgspec

    from banger.api.envelope import WireError

    return {"error": msgspec.to_builtins(WireError.of(error))}


def harmless(text: str) -> str:
    """Text of others, without what a terminal would act on."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[:_MOST_TEXT])


def harmless_json(document: bytes) -> str:
    """The same document, indented. JSON escapes the control characters of ASCII only."""
    import msgspec

    text = msgspec.json.format(document, indent=2).decode()
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def warn(message: str) -> None:
    sys.stderr.write(f"banger: {harmless(message)}\n")
