"""Ed25519 keys in OpenSSH's format: the owner's key for guests, and one host key per VM.

The owner's key is made once and never replaced; a host key lives as long as its VM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from banger.errors import BangerError
from banger.files import ensure_private_directory, locked, write_atomic

if TYPE_CHECKING:
    from pathlib import Path


class KeyPair(msgspec.Struct, frozen=True, kw_only=True):
    """`private` is PEM (OPENSSH PRIVATE KEY), `public` one line with a comment."""

    private: str
    public: str


def generate_key(comment: str) -> KeyPair:
    """A new Ed25519 key pair (RFC 8709, PROTOCOL.key)."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return KeyPair(private=private.decode(), public=f"{public.decode()} {comment}")


def ensure_owner_key(path: Path) -> str:
    """Make the owner's key when it is absent; return the public line.

    Raises:
        BangerError: it cannot be made here, as by a service that may not write into a home.
    """
    public = path.with_name(path.name + ".pub")
    if path.exists() and public.exists():
        # Nothing to write: the daemon's service sees its owner's home read-only.
        return public.read_text().strip()
    try:
        return _make_owner_key(path, public)
    except OSError as e:
        raise BangerError(
            "operation_failed",
            f"making the key {path} that opens guests: {e.strerror}",
            hint="banger ssh-config",
        ) from e


def _make_owner_key(path: Path, public: Path) -> str:
    ensure_private_directory(path.parent)
    with locked(path.parent / ".lock"):
        if not path.exists():
            pair = generate_key("banger")
            write_atomic(public, f"{pair.public}\n".encode(), mode=0o644)
            write_atomic(path, pair.private.encode())
        elif not public.exists():
            key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
            line = key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            write_atomic(public, line + b" banger\n", mode=0o644)
    return public.read_text().strip()
