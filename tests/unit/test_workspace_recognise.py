"""A workspace that the guest has and nobody recorded: it is taken when it is what would be put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.options import ShipOptions
from fakes.guest_files import GuestHost
from workspace_kit import commit, git, make_repository, write


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "repo")
    write(repository, ".gitignore", "ignored\n")
    write(repository, "deep/file", "one\n")
    write(repository, "changing", "one\n")
    commit(repository, "first")
    write(repository, "changing", "two\n")
    write(repository, "run", "#!/bin/sh\n")
    (repository / "run").chmod(0o755)
    (repository / "link").symlink_to("run")
    commit(repository, "second")
    write(repository, "deep/file", "edited\n")
    write(repository, "ignored", "x")
    return repository


OPTIONS = [
    ShipOptions(),
    ShipOptions(mode="metadata_only"),
    ShipOptions(mode="full_copy"),
    ShipOptions(readonly=True),
    ShipOptions(include_untracked=True),
    ShipOptions(branch="work"),
    ShipOptions(branch="work", from_ref="HEAD~1"),
]


def put_and_forget(guests: GuestHost, repository: Path, options: ShipOptions | None = None) -> Path:
    """As when the daemon is killed before it writes the record."""
    path = guests.path()
    guests.prepare(repository, options)
    del guests.manifests[str(path)]
    return path


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_taken_as_it_is(guests: GuestHost, repository: Path, options: ShipOptions) -> None:
    first = guests.prepare(repository, options)
    del guests.manifests[str(guests.path())]
    again = guests.prepare(repository, options)
    assert again.sent == 0
    assert again.manifest.files.keys() == first.manifest.files.keys()
    for kept in ("base_commit", "branch", "mode", "readonly", "tree_id", "source", "mise"):
        assert getattr(again.manifest.workspace, kept) == getattr(first.manifest.workspace, kept)
    write(repository, "deep/file", "edited again\n")
    seen = 0 if options.mode == "metadata_only" else 1
    assert guests.prepare(repository, options).sent == seen
    assert guests.patch(repository)[1].changed == seen


CHANGES: dict[str, Callable[[Path], object]] = {
    "another content": lambda there: write(there, "deep/file", "guest\n"),
    "another mode": lambda there: (there / "deep/file").chmod(0o755),
    "a file more": lambda there: write(there, "new", "x"),
    "a file less": lambda there: (there / "run").unlink(),
    "a commit": lambda there: commit(there, "made in the guest"),
    "a branch": lambda there: git(there, "branch", "made"),
    "no repository": lambda there: (there / ".git").rename(there.parent / "away"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_refused_and_kept_when_anything_is_different(
    guests: GuestHost, repository: Path, change: Callable[[Path], object]
) -> None:
    there = put_and_forget(guests, repository)
    change(there)
    before = {p: p.read_bytes() for p in there.rglob("*") if p.is_file()}
    with pytest.raises(BangerError, match="exists already"):
        guests.prepare(repository)
    assert {p: p.read_bytes() for p in there.rglob("*") if p.is_file()} == before
    assert guests.manifests == {}


def test_an_empty_repository_does_not_take_a_directory_of_the_guest(
    guests: GuestHost, tmp_path: Path
) -> None:
    repository = make_repository(tmp_path / "empty")
    (guests.path() / "directory").mkdir(parents=True)
    with pytest.raises(BangerError, match="exists already"):
        guests.prepare(repository)
