"""Repositories of all shapes, collected by the libgit2 project, go into a guest and back.

git on the host judges: what it takes the guest's tree for is what the patch makes of the base.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.options import Mode, ShipOptions
from fakes.guest_files import GuestHost
from workspace_kit import ENVIRONMENT, git, write

FIXTURES = Path("/usr/share/doc/libgit2-fixtures/examples")
# Their `.git` is a file that leads to another fixture, under a name that is not there.
_NAMES = sorted(p.parent.name for p in FIXTURES.glob("*/.gitted") if p.is_dir()) or ["none"]
# Their index names an object that is not there: all of it cannot be shipped.
_DAMAGED = ("revert",)
_MODES: tuple[Mode, ...] = ("shallow_overlay", "metadata_only", "full_copy")
_WAYS = [(mode, has_git) for mode in _MODES for has_git in (True, False)]
# One way for each repository, so that all have their turn; with BANGER_SOAK each goes every way.
_CASES = [
    (name, *way)
    for number, name in enumerate(_NAMES)
    for way in (_WAYS if "BANGER_SOAK" in os.environ else _WAYS[number % len(_WAYS) :][:1])
]


def _unpack(name: str, target: Path) -> Path:
    shutil.copytree(FIXTURES / name, target, symlinks=True)
    for hidden in sorted(target.rglob(".gitted"), reverse=True):
        hidden.rename(hidden.with_name(".git"))
    return target


def _judge(copy: Path, place: Path) -> set[bytes]:
    """What git takes a guest's tree for: the lines of its tree, without submodules."""
    shutil.copytree(copy, place, symlinks=True)
    # Its files have their modes, whatever the host could keep of them.
    git(place, "-c", "core.fileMode=true", "add", "-A")
    return _lines(place, git(place, "write-tree").decode().strip())


def _lines(repository: Path, tree: str) -> set[bytes]:
    """Without what no checkout can hold, and therefore no patch can name."""
    lines = git(repository, "ls-tree", "-r", "-z", tree).split(b"\0")[:-1]
    odd = (b"..", b".git")
    return {
        line
        for line in lines
        if not line.startswith(b"160000")
        and not any(part in odd for part in line.partition(b"\t")[2].split(b"/"))
    }


def _patched(source: Path, base: str | None, patch: bytes, place: Path) -> set[bytes]:
    """The lines of the base's tree with the patch on it."""
    place.mkdir()
    git(place, "init", "-q")
    (place / ".git/objects/info/alternates").write_text(f"{source}/.git/objects\n")
    if base is not None:
        git(place, "read-tree", base)
    if patch:
        git(place, "apply", "--cached", "--binary", "--whitespace=nowarn", stdin=patch)
    return _lines(place, git(place, "write-tree").decode().strip())


def _edit(copy: Path) -> None:
    files = sorted(
        p for p in copy.iterdir() if p.is_file() and not p.is_symlink() and p.name[0] != "."
    )
    if files:
        files[0].write_bytes(files[0].read_bytes() + b"one more line\n")
        files[-1].unlink()
    for file in files[1:-1]:
        file.chmod(file.stat().st_mode ^ 0o111)
    write(copy, "new directory/new file", "new\r\n")
    (copy / "new link").symlink_to("new directory")


@pytest.mark.parametrize(("name", "mode", "has_git"), _CASES)
def test_repository_comes_back_as_git_sees_it(
    guests: GuestHost, name: str, mode: Mode, has_git: bool, tmp_path: Path
) -> None:
    if not FIXTURES.is_dir():
        pytest.skip("libgit2's fixture repositories are not installed (libgit2-fixtures)")
    guests.git = has_git
    source = _unpack(name, tmp_path / "source")
    try:
        done = guests.prepare(source, ShipOptions(mode=mode), name=name)
    except BangerError as e:
        if name in _DAMAGED and mode == "full_copy":
            assert "unable to read" in str(e)
            return
        # Submodules go in one mode only, and there is no commit to ship of an unborn branch.
        if e.reason != "submodules" and not (mode == "metadata_only" and "commit" in str(e)):
            raise
        done = guests.prepare(source, ShipOptions(mode="full_copy"), name=name)
    copy = guests.path(name)
    base = done.manifest.workspace.base_commit
    for turn in ("as it was shipped", "edited"):
        if turn == "edited":
            _edit(copy)
        patch, _ = guests.patch(source, name=name)
        expected = _judge(copy, tmp_path / f"judge {turn}")
        assert _patched(source, base, patch, tmp_path / f"patched {turn}") == expected, turn
    listed = subprocess.run(
        ["git", "-C", copy, "fsck", "--connectivity-only"],
        env=ENVIRONMENT, capture_output=True, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
