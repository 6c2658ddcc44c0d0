"""Names of what the caller of a command has opened: `/dev/stdout`, `/dev/fd/3`. A copy of the
descriptor is held while the command writes there.

The file may be open for more than this command, so no other file may take its place.
"""

from __future__ import annotations

import os
import re
from typing import BinaryIO

_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev/fd|/proc/self/fd)/([0-9]{1,5})")


def open_opened(path: str) -> BinaryIO | None:
    """What `path` names of our own descriptors, for writing on; None for any other file.

    Raises:
        OSError: it is not open.
    """
    path = os.path.normpath(path)
    found = _DESCRIPTOR.fullmatch(path)
    number = int(found[1]) if found else _STREAMS.get(path)
    return None if number is None else os.fdopen(os.dup(number), "wb")
