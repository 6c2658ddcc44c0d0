"""What a stored file was when it was stored: sha256, size and time, and whether it still is that.

Looking at size and time is what each start can afford; the hash decides when the time differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from banger.files import sha256_file
from banger.units import format_size

if TYPE_CHECKING:
    from pathlib import Path


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was recorded. `mtime_ns` as in stat(2)."""

    sha256: str
    size_bytes: int
    mtime_ns: int


class FileChanged(ValueError):
    """A stored file is missing or is another one; the message says which and how."""


def identify(path: Path) -> FileIdentity:
    """The identity of a file now. Reads all of it."""
    st = path.stat()
    return FileIdentity(sha256=sha256_file(path), size_bytes=st.st_size, mtime_ns=st.st_mtime_ns)


def check_identity(path: Path, known: FileIdentity, *, hash_always: bool = False) -> FileIdentity:
    """Compare a file with its record; return the record, with the new time if only that changed.

    Raises:
        FileChanged: the file is missing, of another size, or of other content.
    """
    try:
        st = path.stat()
    except OSError as e:
        raise FileChanged(f"{path} cannot be read: {e.strerror}") from e
    if st.st_size != known.size_bytes:
        raise FileChanged(
            f"{path} has {st.st_size} bytes ({format_size(st.st_size)}), "
            f"recorded were {known.size_bytes}"
        )
    if st.st_mtime_ns == known.mtime_ns and not hash_always:
        return known
    found = sha256_file(path)
    if found != known.sha256:
        raise FileChanged(f"{path} has the sha256 {found[:16]}…, recorded was {known.sha256[:16]}…")
    return msgspec.structs.replace(known, mtime_ns=st.st_mtime_ns)
