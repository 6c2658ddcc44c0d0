"""How the helper would be run here, with programs of the test's making in sudo's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger import process
from banger.host.lease import derive_mac
from banger.host.privilege import find_privilege

pytestmark = pytest.mark.asyncio


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An ordinary user's view; the directory that stands first on their PATH."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_helper(tmp_path: Path, text: str) -> Path:
    helper = tmp_path / "helper"
    helper.mkdir()
    (helper / "__main__.py").write_text(text)
    return helper


CLEAN = 'print(\'{"version":1,"problems":[]}\')'


async def test_root_that_lacks_nothing_is_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (await find_privilege(write_helper(tmp_path, CLEAN))).kind == "root"


async def test_root_without_what_a_lease_needs_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    helper = write_helper(tmp_path, 'print(\'{"version":1,"problems":["no tun","no nft"]}\')')
    found = await find_privilege(helper)
    assert (found.kind, found.missing) == ("none", "no tun; no nft")


async def test_sudo_that_works_is_sudo(as_user: Path) -> None:
    write_program(as_user / "sudo", '[ "$1 $2" = "-n --" ] || exit 9\nshift 2\nexec "$@"')
    assert (await find_privilege(write_helper(as_user, CLEAN))).kind == "sudo"


async def test_sudo_that_wants_a_password_is_none_with_its_words(as_user: Path) -> None:
    write_program(as_user / "sudo", 'echo "sudo: a password is required" >&2; exit 1')
    found = await find_privilege(write_helper(as_user, CLEAN))
    assert (found.kind, found.hint) == ("none", "sudo -v")
    assert found.missing.endswith("sudo: a password is required")


async def test_no_sudo_is_none(as_user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_program", lambda _: None)
    found = await find_privilege(write_helper(as_user, CLEAN))
    assert found.kind == "none"
    assert "sudo is not installed" in found.missing


async def test_helper_that_babbles_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = await find_privilege(write_helper(tmp_path, "print('hello')"))
    assert "unreadable" in found.missing


async def test_mac_is_derived_from_the_address() -> None:
    assert derive_mac("172.16.0.2") == "06:00:ac:10:00:02"
