"""What is wrong with an image, as the parsers of this room say it; and who says it to the user.

Parsers raise `BadImage` with the fact alone. Whoever knows which image and which part of it was
read turns it into the `BangerError` that leaves the room.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterator


class BadImage(ValueError):
    """The bytes are not what the format or their digest says; the message names the fact."""


@contextlib.contextmanager
def reading(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Turn a BadImage into operation_failed, reason bad_image: `reading <what>: <the fact>`."""
    try:
        yield
    except BadImage as e:
        raise BangerError(
            "operation_failed", f"reading {what}: {e}", hint=hint, reason="bad_image"
        ) from e
