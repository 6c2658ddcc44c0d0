"""banger's own known_hosts: each VM's key is in it before the first contact, gone after delete.

The daemon writes one file; where that is not the owner's (a system installation), the command line
keeps a copy on the owner's side. The user's own file is never touched.
Format: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.files import ensure_private_directory, locked, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def replace_host(path: Path, hosts: Iterable[str], public_key: str | None) -> None:
    """Remove every line of these host names and add one for `public_key` (None: only remove)."""
    names = list(hosts)
    ensure_private_directory(path.parent)
    with locked(path.parent / ".lock"):
        try:
            old = path.read_text().splitlines()
        except FileNotFoundError:
            old = []
        kept = [line for line in old if not set(line.split(" ", 1)[0].split(",")) & set(names)]
        if public_key is not None:
            kind, key = public_key.split()[:2]
            kept.append(f"{','.join(names)} {kind} {key}")
        if kept != old:
            write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def copy_hosts(source: Path, target: Path) -> None:
    """Make `target` hold what `source` holds; an absent source is an empty one.

    Raises:
        OSError: one cannot be read, or the other written. BangerError: its directory is not ours.
    """
    if source == target:
        return
    if not source.exists() and not target.exists():
        return
    ensure_private_directory(target.parent)
    # Read under the lock, so that of two copies the later one is the newer one.
    with locked(target.parent / ".lock"):
        wanted = _read(source)
        if wanted != _read(target):
            write_atomic(target, wanted)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
