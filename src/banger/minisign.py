"""Signatures in minisign's format: what is published is believed by these, and by nothing else.

Only prehashed signatures (algorithm ED) are made and accepted. A signature file holds two: one over
the BLAKE2b-512 hash of the data, and one over that signature and the trusted comment; both count.
Pure functions over text; nothing is kept.

Source: minisign's own description of its file formats; libsodium,
crypto_pwhash_scryptsalsa208sha256 (how a password's cost is told).
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_KEY_ALGORITHM = b"Ed"
_PREHASHED = b"ED"
_CHECKSUM = b"B2"
_SCRYPT = b"Sc"
_NO_KDF = b"\0\0"
_UNTRUSTED = "untrusted comment: "
_TRUSTED = "trusted comment: "
_KEY_FIELDS = struct.Struct("<2s8s32s")
_SIGNATURE_FIELDS = struct.Struct("<2s8s64s")
_SECRET_FIELDS = struct.Struct("<2s2s2s32sQQ104s")
_SECRET_PART = struct.Struct("<8s64s32s")
# What minisign itself asks for is 1 GiB; a file must not make us ask for more.
_MOST_KDF_BYTES = 1 << 30


class BadSignature(ValueError):
    """The data is not what one of the keys signed, or something is no key; the message says why."""


class PublicKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that signatures are checked with."""

    key_id: bytes
    key: bytes

    def __str__(self) -> str:
        """As minisign and configuration files write it: one line of base64."""
        return _encode(_KEY_FIELDS.pack(_KEY_ALGORITHM, self.key_id, self.key))


class SecretKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that signs. Never shown: its text has no secret in it."""

    key_id: bytes
    seed: bytes
    public: PublicKey

    def __repr__(self) -> str:
        return f"SecretKey({show_key_id(self.key_id)})"


def show_key_id(key_id: bytes) -> str:
    """The id as minisign prints it: a number, without zeros in front (PRIX64)."""
    return f"{int.from_bytes(key_id, 'little'):X}"


def parse_public_key(text: str) -> PublicKey:
    """A public key from its line of base64, or from a whole key file.

    Raises:
        BadSignature: it is no minisign public key.
    """
    lines = text.strip().splitlines()
    if len(lines) == 2 and lines[0].startswith(_UNTRUSTED):
        lines = lines[1:]
    if len(lines) != 1:
        raise BadSignature("a minisign public key is one line that begins with RW")
    algorithm, key_id, key = _unpack(_KEY_FIELDS, lines[0], "a public key")
    if algorithm != _KEY_ALGORITHM:
        raise BadSignature("a minisign public key is one line that begins with RW")
    return PublicKey(key_id=key_id, key=key)


def parse_secret_key(text: str, password: Callable[[], str] | None = None) -> SecretKey:
    """A secret key from its file; `password` is asked where the file is encrypted.

    Raises:
        BadSignature: it is no minisign secret key, it is encrypted and there is no password, or the
            password is another one.
    """
    # Hashing takes longer to load than reading a configuration that names a key.
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    lines = text.strip().splitlines()
    if len(lines) != 2 or not lines[0].startswith(_UNTRUSTED):
        raise BadSignature("it is no minisign secret key file")
    algorithm, kdf, checksum, salt, ops, memory, part = _unpack(
        _SECRET_FIELDS, lines[1], "a secret key"
    )
    if (algorithm, checksum) != (_KEY_ALGORITHM, _CHECKSUM) or kdf not in (_SCRYPT, _NO_KDF):
        raise BadSignature("it is no minisign secret key file")
    if kdf == _SCRYPT:
        if password is None:
            raise BadSignature("it is encrypted, and there is no password")
        stream = _derive(password().encode(), salt, ops, memory, len(part))
        part = bytes(a ^ b for a, b in zip(part, stream, strict=True))
    key_id, key, found = _SECRET_PART.unpack(part)
    wanted = hashlib.blake2b(algorithm + key_id + key, digest_size=32).digest()
    # minisign writes no checksum into a key that it does not encrypt.
    if kdf == _SCRYPT and not hmac.compare_digest(found, wanted):
        raise BadSignature("the password is another one")
    raw = Ed25519PrivateKey.from_private_bytes(key[:32]).public_key()
    if raw.public_bytes_raw() != key[32:]:
        raise BadSignature("the key file is damaged")
    return SecretKey(key_id=key_id, seed=key[:32], public=PublicKey(key_id=key_id, key=key[32:]))


def sign(data: bytes, key: SecretKey, *, trusted_comment: str | None = None) -> str:
    """The signature file for `data`. The comment is signed too; by default it holds the time."""
    import time

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    comment = f"timestamp:{int(time.time())}" if trusted_comment is None else trusted_comment
    if any(c in comment for c in "\r\n\0"):
        raise ValueError("a trusted comment is one line")
    private = Ed25519PrivateKey.from_private_bytes(key.seed)
    signature = private.sign(_hash(data))
    both = private.sign(signature + comment.encode())
    return (
        f"{_UNTRUSTED}signature of the key {show_key_id(key.key_id)}\n"
        f"{_encode(_SIGNATURE_FIELDS.pack(_PREHASHED, key.key_id, signature))}\n"
        f"{_TRUSTED}{comment}\n"
        f"{_encode(both)}\n"
    )


def verify(data: bytes, signature: bytes, keys: Sequence[PublicKey]) -> str:
    """The trusted comment, when one of the keys signed `data`.

    Raises:
        BadSignature: none of them did, or the file is no signature of the algorithm ED.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key_id, first, comment, second = _parse_signature(signature)
    found = [key for key in keys if key.key_id == key_id]
    if not found:
        known = ", ".join(show_key_id(key.key_id) for key in keys) or "none"
        raise BadSignature(f"it is signed with the key {show_key_id(key_id)}; known: {known}")
    for key in found:
        public = Ed25519PublicKey.from_public_bytes(key.key)
        try:
            public.verify(first, _hash(data))
            public.verify(second, first + comment)
        except InvalidSignature:
            continue
        return comment.decode("utf-8", "replace")
    raise BadSignature("the signature does not fit: the data or its comment was changed")


def _parse_signature(signature: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Key id, signature, trusted comment, signature of both."""
    # No splitlines: the comment's bytes are signed as they are.
    lines = [line.removesuffix(b"\r") for line in signature.removesuffix(b"\n").split(b"\n")]
    if (
        len(lines) != 4
        or not lines[0].startswith(_UNTRUSTED.encode())
        or not lines[2].startswith(_TRUSTED.encode())
    ):
        raise BadSignature("it is no minisign signature")
    text = lines[1].decode("ascii", "replace")
    algorithm, key_id, first = _unpack(_SIGNATURE_FIELDS, text, "a signature")
    if algorithm == _KEY_ALGORITHM:
        raise BadSignature("it is a signature of the old algorithm Ed; sign with ED")
    if algorithm != _PREHASHED:
        raise BadSignature("it is no minisign signature")
    second = _decode(lines[3].decode("ascii", "replace"), "a signature")
    if len(second) != 64:
        raise BadSignature("it is no minisign signature")
    return key_id, first, lines[2].removeprefix(_TRUSTED.encode()), second


def _derive(password: bytes, salt: bytes, ops: int, memory: int, length: int) -> bytes:
    """scrypt with N and p as libsodium picks them from its two limits; r is 8."""
    import hashlib

    ops = max(ops, 32768)
    if memory > _MOST_KDF_BYTES:
        raise BadSignature("its password asks for more than 1 GiB of memory")
    small = ops < memory // 32
    most = ops // 32 if small else memory // 1024
    log2 = next((n for n in range(1, 63) if 1 << n > most // 2), 63)
    p = 1 if small else min(ops // 4 >> log2, 0x3FFFFFFF) // 8
    try:
        return hashlib.scrypt(
            password, salt=salt, n=1 << log2, r=8, p=p, dklen=length, maxmem=memory + (64 << 20)
        )
    except (ValueError, MemoryError) as e:
        raise BadSignature("the cost of its password makes no sense") from e


def _hash(data: bytes) -> bytes:
    import hashlib

    return hashlib.blake2b(data, digest_size=64).digest()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise BadSignature(f"{what} is base64, and this is not") from e


def _unpack(fields: struct.Struct, text: str, what: str) -> tuple[Any, ...]:
    data = _decode(text, what)
    if len(data) != fields.size:
        raise BadSignature(f"{what} has {fields.size} bytes, and this has {len(data)}")
    return fields.unpack(data)
