"""References: what is written is understood, and understood the same when it is written again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.names import check_entry_name
from banger.oci.reference import (
    SHORT_NAME_REGISTRY,
    FileReference,
    RegistryReference,
    default_name,
    is_explicit,
    parse_reference,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4
_part = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,4}){0,2}", fullmatch=True)
_registry = st.one_of(
    st.from_regex(r"[a-z0-9]{1,8}(\.[a-z0-9]{1,8}){1,3}(:[1-9][0-9]{0,4})?", fullmatch=True),
    st.sampled_from(["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000"]),
)
_tag = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@st.composite
def references(draw: st.DrawFn) -> str:
    registry = draw(st.one_of(st.just(""), _registry.map(lambda r: f"{r}/")))
    parts = draw(st.lists(_part, min_size=1, max_size=3))
    if not registry and len(parts) > 1:
        # A dot in the first of several would make it a registry.
        parts[0] = draw(st.from_regex(r"[a-z0-9]{1,8}(_[a-z0-9]{1,4})?", fullmatch=True))
    path = "/".join(parts)
    tag = draw(st.one_of(st.just(""), _tag.map(lambda t: f":{t}")))
    digest = draw(st.sampled_from(["", f"@{DIGEST}"]))
    return f"{registry}{path}{tag}{digest}"


@given(references())
def test_a_reference_parses_to_what_parses_to_itself(text: str) -> None:
    parsed = parse_reference(text)
    assert isinstance(parsed, RegistryReference)
    assert parse_reference(str(parsed)) == parsed
    check_entry_name(default_name(parsed), "image")


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_refused_with_a_reason(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except BangerError as e:
        assert e.code == "bad_request"
        return
    assert parse_reference(str(parsed)) == parsed
    check_entry_name(default_name(parsed), "image")


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest", "name"),
    [
        ("debian:12", SHORT_NAME_REGISTRY, "library/debian", "12", None, "debian-12"),
        ("alpine", SHORT_NAME_REGISTRY, "library/alpine", "latest", None, "alpine-latest"),
        ("team/app", SHORT_NAME_REGISTRY, "team/app", "latest", None, "app-latest"),
        ("index.docker.io/x", SHORT_NAME_REGISTRY, "library/x", "latest", None, "x-latest"),
        ("localhost/app:1", "localhost", "app", "1", None, "app-1"),
        ("host:5000/a/b:1.2", "host:5000", "a/b", "1.2", None, "b-1.2"),
        ("Host/app", "host", "app", "latest", None, "app-latest"),
        (f"a.b/c@{DIGEST}", "a.b", "c", None, DIGEST, "c-0123456789ab"),
        (f"a.b/c:v@{DIGEST}", "a.b", "c", "v", DIGEST, "c-v"),
        ("oci:v1", SHORT_NAME_REGISTRY, "library/oci", "v1", None, "oci-v1"),
    ],
)  # fmt: skip
def test_names_mean_what_users_of_docker_expect(
    text: str, registry: str, repository: str, tag: str | None, digest: str | None, name: str
) -> None:
    parsed = parse_reference(text)
    assert parsed == RegistryReference(
        registry=registry, repository=repository, tag=tag, digest=digest
    )
    assert default_name(parsed) == name


def test_short_names_go_to_the_configured_registry() -> None:
    parsed = parse_reference("debian:12", "registry.example:5000")
    assert str(parsed) == "registry.example:5000/debian:12"


@pytest.mark.parametrize(
    ("text", "scheme", "path", "tag", "name"),
    [
        ("oci-archive:/a/web.tar", "oci-archive", "/a/web.tar", None, "web"),
        ("oci-archive:/a/web.tar:v2", "oci-archive", "/a/web.tar", "v2", "web-v2"),
        ("docker-archive:saved.tar.gz", "docker-archive", "saved.tar.gz", None, "saved"),
        ("oci:./dir:latest", "oci", "./dir", "latest", "dir-latest"),
        ("oci-archive:/a:b/c.tar", "oci-archive", "/a:b/c.tar", None, "c"),
    ],
)
def test_files_are_named_by_a_scheme(
    text: str, scheme: str, path: str, tag: str | None, name: str
) -> None:
    parsed = parse_reference(text)
    assert isinstance(parsed, FileReference)
    assert (parsed.scheme, parsed.path, parsed.tag) == (scheme, path, tag)
    assert default_name(parsed) == name


@pytest.mark.parametrize(
    "text",
    ["", "UPPER", "a//b", "a:", "a@sha256:12", "a@md5:" + "0" * 32, "-a", "a b", "host:5000/",
     "../x", "a/../b", "oci-archive:", "http://a/b", "a.b/c:" + "t" * 200],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_reference(text)
    assert caught.value.code == "bad_request"


def test_a_bare_word_may_be_the_name_of_an_image() -> None:
    assert not is_explicit("debian-bookworm")
    assert is_explicit("debian:bookworm")
    assert is_explicit("team/app")


@pytest.mark.parametrize("path", ["./app.tar", "../app", "/srv/app.tar", "~/app.tar"])
def test_a_path_alone_is_told_what_it_lacks(path: str) -> None:
    with pytest.raises(BangerError, match="a path needs docker-archive:"):
        parse_reference(path)
