"""Keys for signing in tests, in minisign's file formats but without its program."""

from __future__ import annotations

import base64
import hashlib
import os

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from banger.minisign import PublicKey, SecretKey


def make_key(seed: bytes | None = None) -> SecretKey:
    """A new key pair; the same for the same 32 bytes."""
    seed = seed or os.urandom(32)
    raw = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    key_id = hashlib.sha256(seed).digest()[:8]
    public = PublicKey(key_id=key_id, key=raw.public_bytes(Encoding.Raw, PublicFormat.Raw))
    return SecretKey(key_id=key_id, seed=seed, public=public)


def format_secret_key(key: SecretKey, password: str | None = None) -> str:
    """The key's file; with a password encrypted, at the lowest cost that there is."""
    part = key.key_id + key.seed + key.public.key
    checksum = hashlib.blake2b(b"Ed" + part, digest_size=32).digest()
    kdf, salt, ops, memory = b"\0\0", bytes(32), 0, 0
    if password is None:
        part += bytes(32)
    else:
        part += checksum
        # libsodium picks N = 2^10, r = 8, p = 1 for these limits.
        kdf, salt, ops, memory = b"Sc", os.urandom(32), 32768, 16 << 20
        stream = hashlib.scrypt(
            password.encode(), salt=salt, n=1 << 10, r=8, p=1, dklen=len(part), maxmem=64 << 20
        )
        part = bytes(a ^ b for a, b in zip(part, stream, strict=True))
    limits = ops.to_bytes(8, "little") + memory.to_bytes(8, "little")
    text = base64.b64encode(b"Ed" + kdf + b"B2" + salt + limits + part).decode()
    return f"untrusted comment: secret key of a test\n{text}\n"
