"""What the host's apt says about kernel packages; programs of the test's making speak for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.kernel import apt
from banger.kernel.apt import KernelPackage, find_newest, parse_policy
from banger.kernel.pull import CATALOG

DEBIAN = CATALOG[0]
POLICY = """\
linux-image-6.12.9+deb12-cloud-amd64-unsigned:
  Installed: (none)
  Candidate: 6.12.9-1~deb12u1
  Version table:
     6.12.9-1~deb12u1 500
        500 http://example.invalid/debian-security bookworm-security/main amd64 Packages
linux-image-6.12.101+deb12-cloud-amd64-unsigned:
  Installed: (none)
  Candidate: 6.12.101-1~deb12u1
  Version table:
linux-image-6.12.200+deb12-cloud-amd64-unsigned:
  Installed: (none)
  Candidate: (none)
  Version table:
"""
NAMES = [line.rstrip(":") for line in POLICY.splitlines() if not line.startswith(" ")]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An ordinary user's view; the directory that stands first on their PATH."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def write_program(place: Path, name: str, text: str) -> None:
    (place / name).write_text(f"#!/bin/sh\n{text}\n")
    (place / name).chmod(0o755)


def write_apt_cache(place: Path, names: list[str]) -> None:
    (place / "names").write_text("\n".join(names) + "\n")
    (place / "policy").write_text(POLICY)
    write_program(
        place,
        "apt-cache",
        f"""case "$1" in
pkgnames) cat {place}/names ;;
policy) cat {place}/policy ;;
show) echo "Package: ${{3%%=*}}"; echo "Size: 42"; echo "SHA256: aa"; echo "Tag: a,"; echo " b" ;;
esac""",
    )


def search() -> KernelPackage:
    return find_newest(
        DEBIAN.package,
        prefix=DEBIAN.package_prefix,
        suite=DEBIAN.suite,
        entry=DEBIAN.name,
        job=Job(),
    )


def test_the_newest_available_version_is_chosen_by_debians_order(programs: Path) -> None:
    write_apt_cache(programs, NAMES)
    found = search()
    assert (found.name, found.version) == (
        "linux-image-6.12.101+deb12-cloud-amd64-unsigned",
        "6.12.101-1~deb12u1",
    )
    assert found.size_bytes == 42


def test_packages_that_only_look_alike_are_passed_over(programs: Path) -> None:
    write_apt_cache(
        programs, ["linux-image-6.12.300+deb12-cloud-amd64-dbg", "linux-image-6.12.300+deb12-amd64"]
    )
    with pytest.raises(BangerError) as caught:
        search()
    assert caught.value.code == "not_found"


def test_no_visible_package_names_the_suite_and_the_next_command(programs: Path) -> None:
    write_apt_cache(programs, [])
    with pytest.raises(BangerError) as caught:
        search()
    assert "bookworm-security" in caught.value.message
    assert caught.value.hint == "sudo apt-get update"


def test_a_host_without_apt_is_told_of_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "find_program", lambda name: None)
    with pytest.raises(BangerError) as caught:
        search()
    assert "no apt" in caught.value.message
    assert caught.value.hint == "banger kernel list --available"


def test_root_refreshes_the_lists_once_when_nothing_is_found(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    write_apt_cache(programs, [])
    write_program(programs, "apt-get", f'[ "$2" = update ] && echo "{NAMES[0]}" > {programs}/names')
    (programs / "policy").write_text(POLICY.partition("linux-image-6.12.101")[0])
    assert search().name == NAMES[0]


def test_a_failed_download_says_that_lists_may_be_old(programs: Path, tmp_path: Path) -> None:
    write_program(programs, "apt-get", "echo 'E: 404  Not Found' >&2; exit 100")
    package = KernelPackage(name="linux-image", version="1", sha256="aa", size_bytes=1)
    with pytest.raises(BangerError) as caught:
        apt.download(package, tmp_path, job=Job())
    assert "404" in caught.value.message
    assert caught.value.hint == "sudo apt-get update"


def test_policy_leaves_out_what_cannot_be_installed() -> None:
    assert set(parse_policy(POLICY)) == set(NAMES[:2])
