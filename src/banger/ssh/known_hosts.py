"""banger's own known_hosts: each VM's key is in it before the first contact, gone after delete.

One file for the owner (`<state>/ssh/known_hosts`); the user's own file is never touched.
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
