"""Detached signatures of kernel tarballs, checked by gpgv in a keyring of its own.

The user's keyring and trust take no part. What counts is a valid signature by a pinned primary key
(VALIDSIG in gpgv's status lines): GOODSIG names a user id, which anybody can write into a key.
Source: GnuPG, doc/DETAILS ("General status codes").
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.process import ProcessFailed, get_program

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from banger.disk.background import Job

KEY_LIMIT_BYTES = 1 << 20
_HINT = "banger kernel build --help"
_STATUS = "[GNUPG:] "
# RFC 9580 9.5: SHA-256, SHA-384, SHA-512. Others may be forged, or are not in use there.
_HASHES = frozenset({"8", "9", "10"})
# Beside a VALIDSIG these say that it should not count after all.
_BAD = {
    "BADSIG": "the file is not what was signed",
    "ERRSIG": "the signature could not be checked",
    "NO_PUBKEY": "it was made with a key that is not here",
    "EXPSIG": "the signature has expired",
    "EXPKEYSIG": "the key that signed has expired",
    "REVKEYSIG": "the key that signed was revoked",
}


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """Who signed: the primary key's fingerprint."""

    fingerprint: str


def read_fingerprints(key: bytes, scratch: Path, job: Job) -> tuple[str, ...]:
    """The fingerprints of the primary keys in an exported key.

    Raises:
        BangerError: bad_request: it holds none; not_found: gpg is missing.
    """
    file = scratch / "key.asc"
    file.write_bytes(key)
    try:
        out = job.run([*_gpg(scratch), "--show-keys", "--with-colons", str(file)]).decode()
    except ProcessFailed as e:
        raise BangerError("bad_request", f"reading the signing key: {e}", hint=_HINT) from e
    # A "fpr" record belongs to the "pub" or "sub" before it.
    found = re.findall(r"^pub:[^\n]*\nfpr:(?:[^:\n]*:){8}([0-9A-F]{40}):", out, re.MULTILINE)
    if not found:
        raise BangerError("bad_request", "the signing key holds no OpenPGP key", hint=_HINT)
    return tuple(found)


def verify_detached(
    archive: Path,
    signature: Path,
    keys: Sequence[bytes],
    pinned: Collection[str],
    *,
    what: str,
    scratch: Path,
    job: Job,
) -> Signed:
    """Check that one of `pinned` (fingerprints of primary keys) signed `archive`.

    `keys` are exported keys, `scratch` a directory of the caller's that nobody else writes into.

    Raises:
        BangerError: operation_failed, reason bad_signature, saying what is wrong with it;
            not_found: gpg or gpgv is missing.
    """
    keyring = scratch / "keyring.gpg"
    # gpgv reads binary keys, and several behind one another.
    keyring.write_bytes(b"".join(_unpack_key(key, scratch, job) for key in keys))
    argv = [
        get_program("gpgv", package="gpgv"),
        "--homedir", str(scratch),
        "--keyring", str(keyring),
        "--status-fd", "1",
        str(signature), str(archive),
    ]  # fmt: skip
    said = bytearray()
    status = 0
    try:
        with job.program(argv, stdout=subprocess.PIPE) as p:
            assert p.stdout
            said += p.stdout.read()
    except ProcessFailed as e:
        status = e.status
    return judge(said.decode(errors="replace"), status, pinned, what=what)


def judge(said: str, status: int, pinned: Collection[str], *, what: str) -> Signed:
    """What gpgv's status lines mean.

    Raises:
        BangerError: as `verify_detached`.
    """
    lines = [line.removeprefix(_STATUS).split() for line in said.splitlines() if _STATUS in line]
    words = [line for line in lines if line]
    for keyword, reason in _BAD.items():
        if any(line[0] == keyword for line in words):
            raise _refused(what, reason)
    valid = [line[1:] for line in words if line[0] == "VALIDSIG"]
    if status != 0 or not valid:
        raise _refused(what, "gpgv found no valid signature")
    for fields in valid:
        # fingerprint, date, time, expiry, version, reserved, algorithm, hash, class, primary key
        if len(fields) < 10:
            raise _refused(what, "gpgv did not name the primary key")
        if fields[9] not in pinned:
            raise _refused(what, f"it was made with the key {fields[9]}, which is none of those")
        if fields[7] not in _HASHES or fields[8] != "00":
            raise _refused(what, "it is of a kind that proves too little")
    return Signed(fingerprint=valid[0][9])


def _gpg(scratch: Path) -> list[str]:
    gpg = get_program("gpg", package="gnupg")
    return [gpg, "--homedir", str(scratch), "--batch", "--no-options", "--no-autostart", "--quiet"]


def _unpack_key(key: bytes, scratch: Path, job: Job) -> bytes:
    file = scratch / "key.asc"
    file.write_bytes(key)
    return job.run([*_gpg(scratch), "--dearmor", "--output", "-", str(file)])


def _refused(what: str, problem: str) -> BangerError:
    return BangerError(
        "operation_failed",
        f"{what} is not signed by a key that may sign it: {problem}",
        hint=_HINT,
        reason="bad_signature",
    )
