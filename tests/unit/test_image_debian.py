"""The mmdebstrap command line, the host's apt sources, and pinned npm downloads."""

from __future__ import annotations

import hashlib
import io
import shlex
import tarfile
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.image.debian import build_mmdebstrap_argv, explain_failure, parse_apt_sources
from banger.image.downloads import DownloadMissing, extract_pinned_member, fetch_npm
from banger.image.recipe import NpmDownload, load_recipe
from banger.process import ProcessFailed

TARGETS = """\
http://a.invalid/debian|http://a.invalid/debian/|bookworm|main|Debian
http://a.invalid/debian|http://a.invalid/debian/|bookworm|contrib|Debian
http://a.invalid/debian|http://a.invalid/debian/|bookworm|main|Debian
http://a.invalid/security|http://a.invalid/security/|bookworm-security|main|Debian
http://a.invalid/debian|http://a.invalid/debian/|trixie|main|Debian
https://d.invalid/linux|https://d.invalid/linux/|bookworm|stable|Docker
http://u.invalid/|http://u.invalid/|bookworm|main|$(ORIGIN)
cdrom:[Debian]/|cdrom:[Debian]/|bookworm|main|Debian
"""


def test_debians_own_suites_are_taken_from_the_host_and_no_other() -> None:
    assert parse_apt_sources(TARGETS, "bookworm") == (
        "deb http://a.invalid/debian/ bookworm main contrib",
        "deb http://a.invalid/security/ bookworm-security main",
    )


def test_a_host_of_another_distribution_has_none() -> None:
    assert parse_apt_sources("http://x|http://x/|noble|main|Ubuntu\n", "bookworm") == ()


def argv_of(name: str, *, root: bool = True) -> list[str]:
    return build_mmdebstrap_argv(
        load_recipe(name), ["deb http://a bookworm main"], mmdebstrap="/mm", root=root
    )


def test_the_sources_come_last_and_the_tar_goes_to_stdout() -> None:
    assert argv_of("debian-bookworm-minimal")[-3:] == [
        "bookworm",
        "-",
        "deb http://a bookworm main",
    ]


def test_only_root_works_without_a_user_namespace() -> None:
    assert "--mode=root" in argv_of("debian-bookworm")
    assert "--mode=unshare" in argv_of("debian-bookworm", root=False)


def test_a_script_reaches_the_chroot_unchanged() -> None:
    hooks = [arg for arg in argv_of("debian-bookworm") if arg.startswith("--customize-hook=")]
    scripts = load_recipe("debian-bookworm")
    for hook, name in zip(hooks, scripts.recipe.scripts, strict=True):
        words = shlex.split(hook.partition("=")[2])
        assert words[:5] == ["chroot", "$1", "/bin/sh", "-eu", "-c"]
        assert words[5].encode() == scripts.sources[name]


def test_what_is_kept_of_the_documentation_comes_after_what_is_not() -> None:
    rules = [arg for arg in argv_of("debian-bookworm") if "path-" in arg]
    assert [("exclude" in rule) for rule in rules] == sorted(
        [("exclude" in rule) for rule in rules], reverse=True
    )


def test_an_unknown_key_hints_at_the_keyring() -> None:
    failure = ProcessFailed(["mmdebstrap"], 25, b"W: x\nE: NO_PUBKEY 0E98404D386FA1D9\nI: done\n")
    explained = explain_failure(failure, "bookworm")
    assert "NO_PUBKEY" in explained.message
    assert "debian-archive-keyring" in (explained.hint or "")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "x.tgz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/bin/tool")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"tool"))
    return path


def pinned(archive: Path, *, member: str = "package/bin/tool", sha512: str = "") -> NpmDownload:
    return NpmDownload(
        name="tool",
        npm="@x/tool",
        version="1.0",
        sha512=sha512 or hashlib.sha512(archive.read_bytes()).hexdigest(),
        member=member,
        path="/usr/local/bin/tool",
    )


def test_a_pinned_archive_gives_its_member(archive: Path, tmp_path: Path) -> None:
    extract_pinned_member(pinned(archive), archive, tmp_path / "tool")
    assert (tmp_path / "tool").read_bytes() == b"tool"


def test_another_archive_than_the_pinned_one_is_never_unpacked(
    archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(BangerError, match="sha512"):
        extract_pinned_member(pinned(archive, sha512="0" * 128), archive, tmp_path / "tool")
    assert not (tmp_path / "tool").exists()


def test_an_archive_without_the_member_is_an_error(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="package/other"):
        extract_pinned_member(pinned(archive, member="package/other"), archive, tmp_path / "tool")


def test_a_host_without_npm_is_a_missing_download(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.image.downloads.find_program", lambda name: None)
    with pytest.raises(DownloadMissing, match="npm is not installed"):
        fetch_npm(pinned(archive), tmp_path / "tool", job=Job())


@pytest.mark.parametrize(
    "change", [{"npm": "--registry=x"}, {"npm": "../x"}, {"version": "latest"}, {"sha512": "ab"}]
)
def test_a_download_that_is_not_pinned_to_one_package_is_refused(
    archive: Path, change: dict[str, str]
) -> None:
    fields = {
        "name": "t", "npm": "@x/t", "version": "1", "sha512": "0" * 128, "member": "m",
        "path": "/t",
    }  # fmt: skip
    with pytest.raises(ValueError, match="npm must be|sha512"):
        NpmDownload(**(fields | change))  # type: ignore[arg-type] # a bool field stays unset
