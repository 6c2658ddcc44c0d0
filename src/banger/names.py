"""VM names, ids and references: what is allowed, and what is made when nothing was asked for."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, NewType

from banger.errors import BangerError
from banger.wordlists import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from collections.abc import Callable

VmId = NewType("VmId", str)
ImageId = NewType("ImageId", str)

RESERVED = frozenset({"ns", "localhost"})
_COLLISIONS_BEFORE_NUMBER = 5


def check_vm_name(name: str) -> str:
    """Return `name` unchanged, or refuse it: 1 to 63 of `a-z 0-9 -`, no hyphen at an edge.

    The rule is a DNS label in lower case (RFC 1123 §2.1), because the name becomes `<name>.vm`.

    Raises:
        BangerError: bad_request, naming the rule and the position of the bad character.
    """
    problem: str | None = None
    if not name:
        problem = "it is empty"
    elif len(name) > 63:
        problem = f"it has {len(name)} characters, 63 at most"
    elif bad := re.search(r"[^a-z0-9-]", name):
        problem = f"character {bad[0]!r} at position {bad.start() + 1}; allowed are a-z, 0-9 and -"
    elif name.startswith("-") or name.endswith("-"):
        problem = "it begins or ends with a hyphen"
    elif name in RESERVED:
        problem = "it is reserved"
    if problem:
        raise BangerError(
            "bad_request",
            f"VM name {name!r} is not allowed: {problem}",
            hint="banger vm run --help",
        )
    return name


def check_entry_name(name: str, kind: str) -> str:
    """Return the name of a kernel or image unchanged, or refuse it.

    Raises:
        BangerError: bad_request. The name is a directory's name, so it may not climb.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise BangerError(
            "bad_request",
            f"{kind} name {name!r} is not allowed: letters, digits, '.', '-' and '_', "
            "beginning with a letter or digit, 128 at most",
            hint=f"banger {kind} list",
        )
    return name


def temporary_image_name() -> str:
    """A name for an image that does not outlive the build that it is for."""
    return f"build-base-{secrets.token_hex(4)}"


def is_temporary_image(name: str) -> bool:
    """Whether an image of this name was made for a build only."""
    return re.fullmatch(r"build-base-[0-9a-f]{8}", name) is not None


def new_vm_id() -> VmId:
    return VmId(secrets.token_hex(16))


def short_id(vm_id: str) -> str:
    return vm_id[:8]


def generate_vm_name(taken: Callable[[str], bool]) -> str:
    """An `adjective-noun` that is free; a number is appended after five collisions."""
    for attempt in range(1000):
        name = f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}"
        if attempt >= _COLLISIONS_BEFORE_NUMBER:
            name = f"{name}-{secrets.randbelow(9000) + 1000}"
        if not taken(name):
            return name
    raise BangerError("operation_failed", "no free VM name was found", hint="banger vm list")
