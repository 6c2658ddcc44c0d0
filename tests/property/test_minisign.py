"""Signatures: round trips, every changed byte, and the minisign program in both directions."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.minisign import (
    BadSignature,
    PublicKey,
    parse_public_key,
    parse_secret_key,
    show_key_id,
    sign,
    verify,
)
from fakes.signing import format_secret_key, make_key

KEY = make_key(bytes(range(32)))
OTHER = make_key(bytes(32))
COMMENTS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C"]))

needs_minisign = pytest.mark.skipif(
    shutil.which("minisign") is None, reason="the program minisign is not installed"
)


@given(data=st.binary(max_size=300), comment=COMMENTS)
def test_what_was_signed_is_accepted_with_its_comment(data: bytes, comment: str) -> None:
    signature = sign(data, KEY, trusted_comment=comment).encode()
    assert verify(data, signature, [OTHER.public, KEY.public]) == comment


@given(data=st.data())
def test_a_signature_with_a_changed_byte_is_refused(data: st.DataObject) -> None:
    text = bytearray(sign(b"the index", KEY, trusted_comment="version:1").encode())
    # The first line is a comment that nobody signs.
    at = data.draw(st.integers(text.index(b"\n") + 1, len(text) - 2))
    old = text[at]
    text[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    with pytest.raises(BadSignature):
        verify(b"the index", bytes(text), [KEY.public])


@given(text=st.binary(max_size=400))
def test_garbage_is_no_signature_and_no_key(text: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(b"", text, [KEY.public])
    for parse in (parse_public_key, parse_secret_key):
        with pytest.raises(BadSignature):
            parse(text.decode("latin-1"))


@given(data=st.binary(max_size=50), other=st.binary(max_size=50))
def test_another_content_is_refused(data: bytes, other: bytes) -> None:
    if data == other:
        return
    with pytest.raises(BadSignature):
        verify(other, sign(data, KEY).encode(), [KEY.public])


@pytest.mark.parametrize("keys", [(), (OTHER.public,)], ids=["none", "another"])
def test_an_unknown_key_is_refused_by_its_id(keys: tuple[PublicKey, ...]) -> None:
    with pytest.raises(BadSignature, match=show_key_id(KEY.key_id)):
        verify(b"x", sign(b"x", KEY).encode(), keys)


def test_a_key_that_takes_anothers_id_is_refused() -> None:
    imposter = PublicKey(key_id=KEY.key_id, key=OTHER.public.key)
    with pytest.raises(BadSignature, match="does not fit"):
        verify(b"x", sign(b"x", KEY).encode(), [imposter])
    # A second key of that id that does fit is found.
    assert verify(b"x", sign(b"x", KEY, trusted_comment="t").encode(), [imposter, KEY.public])


def test_the_comment_of_another_signature_is_refused() -> None:
    one, two = (sign(b"x", KEY, trusted_comment=c).splitlines() for c in ("one", "two"))
    mixed = "\n".join([*one[:2], *two[2:]])
    assert one[1] == two[1]  # the same data: only the second signature knows the comment
    verify(b"x", mixed.encode(), [KEY.public])
    forged = "\n".join([*one[:2], two[2], one[3]])
    with pytest.raises(BadSignature):
        verify(b"x", forged.encode(), [KEY.public])


def test_the_algorithm_that_does_not_hash_first_is_refused() -> None:
    lines = sign(b"x", KEY).splitlines()
    raw = base64.b64decode(lines[1])
    lines[1] = base64.b64encode(b"Ed" + raw[2:]).decode()
    with pytest.raises(BadSignature, match="old algorithm"):
        verify(b"x", "\n".join(lines).encode(), [KEY.public])


def test_a_comment_of_two_lines_cannot_be_signed() -> None:
    with pytest.raises(ValueError, match="one line"):
        sign(b"x", KEY, trusted_comment="a\nb")


@settings(max_examples=5)
@given(password=st.text(max_size=20))
def test_an_encrypted_key_needs_its_password(password: str) -> None:
    text = format_secret_key(KEY, password)
    assert parse_secret_key(text, lambda: password) == KEY
    with pytest.raises(BadSignature, match="another"):
        parse_secret_key(text, lambda: password + "x")
    with pytest.raises(BadSignature, match="encrypted"):
        parse_secret_key(text)


def test_the_text_of_a_secret_key_shows_no_secret() -> None:
    assert KEY.seed.hex() not in repr(KEY)
    assert str(KEY.seed) not in repr(KEY)


# --- the judge ------------------------------------------------------------------------------------


def minisign(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["minisign", *words], input=stdin, capture_output=True, text=True, check=False
    )


@needs_minisign
@settings(max_examples=10)
@given(data=st.binary(max_size=3000), comment=COMMENTS.filter(bool))
def test_minisign_accepts_what_we_sign(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, comment: str
) -> None:
    place = tmp_path_factory.mktemp("m")
    (place / "f").write_bytes(data)
    (place / "f.minisig").write_text(sign(data, KEY, trusted_comment=comment))
    done = minisign("-V", "-Q", "-P", str(KEY.public), "-m", str(place / "f"))
    assert (done.returncode, done.stdout) == (0, f"{comment}\n"), done.stderr
    (place / "f").write_bytes(data + b"x")
    assert minisign("-V", "-P", str(KEY.public), "-m", str(place / "f")).returncode != 0


@needs_minisign
def test_we_accept_what_minisign_signs_with_a_key_of_its_own(tmp_path: Path) -> None:
    secret, public, file = (tmp_path / name for name in ("s.key", "p.pub", "f"))
    file.write_bytes(b"content")
    made = minisign("-G", "-W", "-s", str(secret), "-p", str(public))
    assert made.returncode == 0, made.stderr
    signed = minisign("-S", "-s", str(secret), "-m", str(file), "-t", "hello there")
    assert signed.returncode == 0, signed.stderr
    key = parse_public_key(public.read_text())
    signature = (tmp_path / "f.minisig").read_bytes()
    assert verify(b"content", signature, [key]) == "hello there"
    assert parse_secret_key(secret.read_text()).public == key
    assert public.read_text().splitlines()[1] == str(key)
    told = f"untrusted comment: minisign public key {show_key_id(key.key_id)}"
    assert public.read_text().splitlines()[0] == told
    # And back: minisign reads what we sign with its key.
    (tmp_path / "f.minisig").write_text(sign(b"content", parse_secret_key(secret.read_text())))
    assert minisign("-V", "-p", str(public), "-m", str(file)).returncode == 0


@needs_minisign
def test_minisign_reads_the_encrypted_keys_that_we_read(tmp_path: Path) -> None:
    """Otherwise the tests' own writer of keys would judge our reader."""
    secret, file = tmp_path / "s.key", tmp_path / "f"
    secret.write_text(format_secret_key(KEY, "pass word"))
    file.write_bytes(b"content")
    done = minisign("-S", "-s", str(secret), "-m", str(file), stdin="pass word\n")
    assert done.returncode == 0, done.stderr
    verify(b"content", (tmp_path / "f.minisig").read_bytes(), [KEY.public])


@needs_minisign
@pytest.mark.parametrize(
    "key_id",
    [bytes(8), b"\1" + bytes(7), b"\xef\xcd\xab\0\0\0\0\0", b"\0" * 7 + b"\x0a", b"\xff" * 8],
)
def test_ids_are_shown_as_minisign_prints_them(key_id: bytes, tmp_path: Path) -> None:
    """It names both when a signature is of another key."""
    file = tmp_path / "f"
    file.write_bytes(b"content")
    (tmp_path / "f.minisig").write_text(sign(b"content", KEY))
    named = PublicKey(key_id=key_id, key=KEY.public.key)
    done = minisign("-V", "-P", str(named), "-m", str(file))
    words = (done.stdout + done.stderr).split()
    assert words[words.index("is") + 1] == show_key_id(KEY.key_id)
    assert words[-1] == show_key_id(key_id)
