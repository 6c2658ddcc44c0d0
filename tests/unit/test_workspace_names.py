"""Names: checked, quoted as git quotes, URLs without credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.names import check_name, format_name, sanitise_name, strip_credentials
from workspace_kit import git, make_repository, write


@pytest.mark.parametrize(
    "name",
    [b"plain", b"with space", b"tab\there", b"new\nline", b'quo"te', b"back\\slash", b"\x01\x7f",
     b"latin\xff", b"dir/\xc3\x28", b"bell\a\b\v\f\r"],
)  # fmt: skip
def test_names_are_quoted_as_git_quotes_them(tmp_path: Path, name: bytes) -> None:
    repository = make_repository(tmp_path / "r")
    write(repository, name)
    assert format_name(name).encode() + b"\n" == git(repository, "ls-files", "-o")


def test_readable_names_in_any_language_are_left_alone() -> None:
    assert format_name("süß/日本.txt".encode()) == "süß/日本.txt"


def test_names_that_would_turn_the_line_around_are_quoted() -> None:
    assert format_name("a\u202eb".encode()) == '"a\\342\\200\\256b"'


@pytest.mark.parametrize(
    "name",
    [b"/etc/passwd", b"../x", b"a/../b", b"a/./b", b"a//b", b".git/config", b"a/.GIT/hooks/x", b"",
     b".", b"a/", b"x/" * 300 + b"x"],
)  # fmt: skip
def test_names_that_no_checkout_can_hold_are_refused(name: bytes) -> None:
    with pytest.raises(BangerError, match="no checkout can hold"):
        check_name(name)


@pytest.mark.parametrize("name", [b".gitignore", b"a/.github/x", b"..a", b"a..", b"...", b"git"])
def test_names_that_only_look_special_pass(name: bytes) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://user:secret@example.org/a.git", "https://example.org/a.git"),
        ("https://ghp_token@example.org/a.git", "https://example.org/a.git"),
        ("https://u:p@ss@example.org:8443/a", "https://example.org:8443/a"),
        ("https://example.org/a.git?private_token=x", "https://example.org/a.git"),
        ("HTTPS://token@example.org/a", "HTTPS://example.org/a"),
        ("foo::https://token@example.org/a", "foo::https://example.org/a"),
        ("ssh://git@example.org/a.git", "ssh://git@example.org/a.git"),
        ("ssh://git:pw@example.org:22/a.git", "ssh://git@example.org:22/a.git"),
        ("git@example.org:a/b.git", "git@example.org:a/b.git"),
        ("https://example.org/a@b", "https://example.org/a@b"),
        ("/srv/git/a.git", "/srv/git/a.git"),
        ("file:///srv/a.git", "file:///srv/a.git"),
        ("../other", "../other"),
    ],
)
def test_url_loses_its_credentials_and_nothing_else(url: str, clean: str) -> None:
    assert strip_credentials(url) == clean


@pytest.mark.parametrize(
    ("name", "guest"),
    [("banger", "banger"), ("my repo (1)", "my-repo-1"), (".dotfiles", "dotfiles"), ("-rf", "rf"),
     ("日本", "repo"), ("..", "repo"), ("a\nb", "a-b"), ("x" * 100, "x" * 64)],
)  # fmt: skip
def test_guest_directory_has_a_plain_name(name: str, guest: str) -> None:
    assert sanitise_name(name) == guest
