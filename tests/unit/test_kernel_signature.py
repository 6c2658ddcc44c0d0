"""Signed tarballs: whose signature counts. Keys are made by gpg for the test; gpgv is the judge."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.catalog import BuildKernel
from banger.daemon import given
from banger.disk.background import Job
from banger.errors import BangerError
from banger.kernel.build_recipe import Signer, get_build_recipe, read_signing_keys
from banger.kernel.entries import find_kernel
from banger.kernel.signature import judge, read_fingerprints
from fakes.kernel_build import NAME, RECIPE, Place

pytestmark = pytest.mark.asyncio

GREG = "Greg Kroah-Hartman (Linux kernel stable release signing key) <greg@kroah.com>"


class Keyring:
    """Keys of the test's own, in a home of their own; gpg's agent ends with it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def gpg(self, *words: str, stdin: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--no-options"]
        argv += ["--passphrase", "", "--pinentry-mode", "loopback"]
        return subprocess.run([*argv, *words], input=stdin, capture_output=True, check=True).stdout

    def make(self, user: str, *, expires: str = "never", faked_time: str | None = None) -> str:
        """A new key; its fingerprint."""
        words = ["--faked-system-time", faked_time] if faked_time else []
        before = set(self.fingerprints())
        self.gpg(
            *words,
            "--allow-weak-key-signatures",
            "--quick-gen-key",
            user,
            "ed25519",
            "sign",
            expires,
        )
        (new,) = set(self.fingerprints()) - before
        return new

    def fingerprints(self) -> list[str]:
        out = self.gpg("--list-keys", "--with-colons").decode()
        return [line.split(":")[9] for line in out.splitlines() if line.startswith("fpr:")]

    def export(self, *fingerprints: str) -> bytes:
        return self.gpg("--armor", "--export", *fingerprints)

    def sign(self, fingerprint: str, data: bytes, *options: str) -> bytes:
        return self.gpg(
            *options, "--armor", "--detach-sign", "--local-user", fingerprint, stdin=data
        )


@pytest.fixture(scope="module")
def keyring() -> Iterator[Keyring]:
    # gpg's agent listens there: a socket's path holds 108 bytes.
    home = Path(tempfile.mkdtemp(prefix="bk-", dir="/tmp"))
    try:
        yield Keyring(home)
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def stable(keyring: Keyring) -> str:
    """The key that may sign."""
    return keyring.make(GREG)


@pytest.fixture(scope="module")
def stranger(keyring: Keyring) -> str:
    """A key that says it is the same person."""
    return keyring.make(f"Not {GREG}")


class Signing:
    """A tarball with its signature, and a recipe that knows one signer."""

    def __init__(self, place: Place, root: Path, keyring: Keyring, signer: str) -> None:
        self.place, self.root, self.keyring = place, root, keyring
        self.recipe = msgspec.structs.replace(
            RECIPE, signers=(Signer(name="the stable team", fingerprint=signer),)
        )
        self.archive = root / "linux-6.12.9.tar.xz"
        self.tar = place.source.tar()
        self.archive.write_bytes(lzma.compress(self.tar))
        self.sign(keyring.sign(signer, self.tar))
        self.key = root / "key.asc"
        self.key.write_bytes(keyring.export(signer))

    def sign(self, signature: bytes) -> None:
        (self.root / "linux-6.12.9.tar.sign").write_bytes(signature)

    async def build(self, **changes: Any) -> Any:
        fields: dict[str, Any] = {
            "recipe": NAME, "source": str(self.archive), "signing_key": self.key.read_text()
        }  # fmt: skip
        daemon: Any = type("D", (), {})()
        daemon.paths = self.place.paths
        daemon.settings = type("S", (), {"disk_reserve_bytes": 0})()
        params = BuildKernel(**{**fields, **changes})
        return await given.kernel_build(daemon, self.place.report, params)  # type: ignore[arg-type]


@pytest.fixture
def signing(
    tmp_path: Path, keyring: Keyring, stable: str, monkeypatch: pytest.MonkeyPatch
) -> Signing:
    made = Signing(Place(tmp_path, monkeypatch), tmp_path, keyring, stable)
    monkeypatch.setattr(given, "get_build_recipe", lambda name: made.recipe)
    return made


async def test_a_tarball_that_a_known_key_signed_is_built(signing: Signing) -> None:
    record = await signing.build()
    assert record.kernel_version == "6.12.9"
    assert record.source.startswith("build:linux-6.12.9.tar.xz sha256 ")
    assert "unpacking linux-6.12.9.tar.xz (signed by the stable team)" in signing.place.report.lines
    # What was verified is not there any more, and gpg left nothing.
    assert len(signing.place.left_behind()) == 2


async def refused(signing: Signing, words: str, **changes: Any) -> BangerError:
    with pytest.raises(BangerError) as caught:
        await signing.build(**changes)
    assert words in caught.value.message
    assert find_kernel(signing.place.paths, NAME) is None
    assert signing.place.left_behind() == []
    assert signing.place.source.compiled == 0
    return caught.value


async def test_a_changed_tarball_is_refused(signing: Signing) -> None:
    signing.archive.write_bytes(lzma.compress(signing.tar + b"\0"))
    error = await refused(signing, "the file is not what was signed")
    assert error.reason == "bad_signature"


async def test_a_signature_by_somebody_of_the_same_name_is_refused(
    signing: Signing, stranger: str
) -> None:
    """GOODSIG would name the right person; the key is not theirs."""
    signing.sign(signing.keyring.sign(stranger, signing.tar))
    key = signing.keyring.export(stranger).decode()
    await refused(signing, f"the signing key {stranger} is none of those", signing_key=key)
    # Slipped in behind the right one: valid for gpgv, but not pinned.
    both = signing.keyring.export(signing.recipe.signers[0].fingerprint, stranger).decode()
    error = await refused(signing, "is none of those", signing_key=both)
    assert stranger in error.message
    # And without its key it cannot be checked.
    await refused(signing, "the signature could not be checked")


async def test_a_valid_signature_beside_a_strangers_does_not_save_it(
    signing: Signing, stranger: str
) -> None:
    armoured = signing.keyring.sign(
        stranger, signing.tar, "--local-user", signing.recipe.signers[0].fingerprint
    )
    signing.sign(armoured)
    await refused(signing, "the signature could not be checked")


async def test_a_signature_of_text_or_with_an_old_hash_is_refused(signing: Signing) -> None:
    signer = signing.recipe.signers[0].fingerprint
    signing.sign(signing.keyring.sign(signer, signing.tar, "--textmode"))
    await refused(signing, "proves too little")
    signing.sign(signing.keyring.sign(signer, signing.tar, "--digest-algo", "SHA1"))
    await refused(signing, "not signed by a key that may sign it")


async def test_something_else_in_place_of_a_signature_is_refused(signing: Signing) -> None:
    signing.sign(b"trust me\n")
    await refused(signing, "gpgv found no valid signature")
    signing.sign(b"x" * (64 * 1024 + 1))
    await refused(signing, "too large for a signature")
    (signing.root / "linux-6.12.9.tar.sign").unlink()
    await refused(signing, "sources come with their detached signature")


async def test_a_key_that_has_expired_does_not_count(signing: Signing, keyring: Keyring) -> None:
    when = "20200101T000000"
    old = keyring.make("old", expires="20200201T000000", faked_time=when)
    signing.recipe = msgspec.structs.replace(
        signing.recipe, signers=(Signer(name="old", fingerprint=old),)
    )
    signing.sign(keyring.sign(old, signing.tar, "--faked-system-time", when))
    key = keyring.export(old).decode()
    await refused(signing, "has expired", signing_key=key)


async def test_what_is_no_archive_is_refused(signing: Signing) -> None:
    signing.archive.write_bytes(b"no xz")
    await refused(signing, "unpacking linux-6.12.9.tar.xz")
    await refused(signing, "is no .tar.xz", source=str(signing.root / "linux.zip"))


async def test_a_key_or_a_signature_without_a_tarball_is_refused(signing: Signing) -> None:
    await refused(signing, "a signing key is for a tarball", source=None)
    await refused(signing, "it takes both files", source=None, signature="/x", signing_key=None)


async def test_a_key_that_is_none_is_refused(signing: Signing) -> None:
    await refused(signing, "signing key", signing_key="nothing of the kind")


VALID = "[GNUPG:] VALIDSIG {sub} 2026-01-01 1767225600 0 4 0 1 {hash} {kind} {primary}\n"
PRIMARY, SUB, OTHER = "A" * 40, "B" * 40, "C" * 40


def say(*lines: str, **changes: str) -> str:
    fields = {"sub": SUB, "primary": PRIMARY, "hash": "8", "kind": "00", **changes}
    return "".join(lines) + VALID.format(**fields)


async def test_the_primary_key_is_what_is_pinned() -> None:
    assert judge(say(), 0, {PRIMARY}, what="x").fingerprint == PRIMARY
    with pytest.raises(BangerError, match=f"the key {PRIMARY}"):
        judge(say(), 0, {SUB}, what="x")


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("[GNUPG:] GOODSIG AAAA Greg <greg@kroah.com>\n", 0),
        ("gpgv: VALIDSIG in a user's name\n", 0),
        ("", 0),
        (say(), 1),
        (say("[GNUPG:] REVKEYSIG AAAA x\n"), 0),
        (say("[GNUPG:] EXPKEYSIG AAAA x\n"), 0),
        (say("[GNUPG:] EXPSIG AAAA x\n"), 0),
        (say("[GNUPG:] BADSIG AAAA x\n"), 0),
        (say("[GNUPG:] ERRSIG AAAA 1 8 00 1 9\n"), 0),
        (say(hash="2"), 0),
        (say(kind="01"), 0),
        (say(say(primary=OTHER)), 0),
        (f"[GNUPG:] VALIDSIG {SUB} 2026-01-01\n", 0),
    ],
)
async def test_only_a_valid_signature_and_nothing_else_counts(said: str, status: int) -> None:
    with pytest.raises(BangerError) as caught:
        judge(said, status, {PRIMARY}, what="linux.tar.xz")
    assert caught.value.reason == "bad_signature"
    assert caught.value.message.startswith("linux.tar.xz is not signed by a key that may sign it: ")


async def test_the_shipped_keys_are_those_that_the_recipe_names(tmp_path: Path) -> None:
    recipe = get_build_recipe(NAME)
    keys = read_signing_keys(recipe)
    assert len(keys) == len(recipe.signers) > 0
    for key, signer in zip(keys, recipe.signers, strict=True):
        tmp_path.chmod(0o700)
        assert read_fingerprints(key, tmp_path, Job()) == (signer.fingerprint,)
