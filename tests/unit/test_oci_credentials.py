"""Logins: where they are found, who is asked, and that nobody reads them in a message."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from banger.oci.auth import Challenge, parse_challenges
from banger.oci.credentials import Credentials, find_credentials
from banger.oci.reference import SHORT_NAME_REGISTRY

HOST = "registry.example:5000"


def config(root: Path, **content: Any) -> Path:
    path = root / "config.json"
    path.write_text(json.dumps(content))
    return path


def find(path: Path, host: str = HOST) -> tuple[Credentials | None, list[str]]:
    told: list[str] = []
    return find_credentials(host, path=path, warn=told.append), told


def helper(root: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "docker-credential-test"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}:/usr/bin:/bin")


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize("name", [HOST, f"https://{HOST}", f"http://{HOST}/v1/"])
def test_a_stored_login_is_found_under_every_name_that_docker_used(
    tmp_path: Path, name: str
) -> None:
    found, _ = find(config(tmp_path, auths={name: auth("u", "p:w")}))
    assert found == Credentials(username="u", password="p:w")


def test_the_short_names_registry_has_its_login_under_its_old_address(tmp_path: Path) -> None:
    path = config(tmp_path, auths={"https://index.docker.io/v1/": auth("u", "p")})
    assert find(path, SHORT_NAME_REGISTRY)[0] == Credentials(username="u", password="p")


def test_logins_of_other_hosts_are_not_taken(tmp_path: Path) -> None:
    names = ("registry.example", "registry.example:5001", f"evil.{HOST}", f"{HOST}.evil")
    assert find(config(tmp_path, auths={n: auth("u", "p") for n in names})) == (None, [])


def test_without_a_file_there_is_no_login_and_no_word(tmp_path: Path) -> None:
    assert find(tmp_path / "none.json") == (None, [])


def test_an_identity_token_is_kept_apart(tmp_path: Path) -> None:
    path = config(tmp_path, auths={HOST: {**auth("u", ""), "identitytoken": "t"}})
    assert find(path)[0] == Credentials(identity_token="t")


def test_a_helper_is_asked_by_the_hosts_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'read host; echo "{\\"Username\\":\\"$1\\",\\"Secret\\":\\"for-$host\\"}"'
    helper(tmp_path, script, monkeypatch)
    expected = Credentials(username="get", password=f"for-{HOST}")
    assert find(config(tmp_path, credHelpers={HOST: "test"}))[0] == expected
    assert find(config(tmp_path, credsStore="test"))[0] == expected


def test_a_helpers_token_is_an_identity_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, """echo '{"Username":"<token>","Secret":"t"}'""", monkeypatch)
    assert find(config(tmp_path, credsStore="test"))[0] == Credentials(identity_token="t")


def test_a_helper_that_knows_nothing_leaves_the_stored_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, "echo credentials not found in native keychain; exit 1", monkeypatch)
    path = config(tmp_path, credsStore="test", auths={HOST: auth("u", "p")})
    assert find(path) == (Credentials(username="u", password="p"), [])


@pytest.mark.parametrize(
    ("content", "script"),
    [
        ({"credsStore": "test"}, "echo SECRET; echo SECRET >&2; exit 2"),
        ({"credsStore": "test"}, "echo SECRET"),
        ({"credsStore": "missing"}, "true"),
        ({"credsStore": "../../bin/sh"}, "true"),
        ({"auths": {HOST: {"auth": "SECRET!"}}}, "true"),
        ({"auths": "SECRET"}, "true"),
    ],
)
def test_what_fails_is_told_without_secrets_and_the_pull_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], script: str
) -> None:
    helper(tmp_path, script, monkeypatch)
    found, told = find(config(tmp_path, **content))
    assert found is None
    assert len(told) == 1
    assert "SECRET" not in told[0]


def test_credentials_do_not_show_their_secret() -> None:
    assert "hidden" not in repr(Credentials(username="u", password="hidden"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://a/t?x=1,2", "service": "s",
                         "scope": "repository:a/b:pull,push"})],
        ),
        ('Basic realm="a \\"b\\""', [("basic", {"realm": 'a "b"'})]),
        ("Basic realm=x, Bearer realm=y", [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        ("", []),
        ("Negotiate", []),
    ],
)  # fmt: skip
def test_challenges_are_parsed(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header) == [
        Challenge(scheme=scheme, parameters=parameters) for scheme, parameters in expected
    ]
