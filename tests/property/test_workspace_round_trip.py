"""Random repositories go through pack and GNU tar; git judges the copy."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.workspace.options import ShipOptions
from workspace_kit import (
    commit,
    git,
    head,
    make_repository,
    reference,
    remove,
    ship,
    status,
    tracked_files,
    write,
)

# Few letters, so that names collide, nest and replace each other.
_PART = st.one_of(
    st.sampled_from([b"a", b"b", b"c d", b"new\nline", b"tab\t", b'q"uote', b"\xff\xfe", b"-x"]),
    st.binary(min_size=1, max_size=6).filter(
        lambda b: b"/" not in b and b"\0" not in b and b not in (b".", b"..")
        and b.lower() != b".git"
    ),
    st.just(b"long" * 30),
)  # fmt: skip
_NAME = st.lists(_PART, min_size=1, max_size=3).map(b"/".join)
_STEP = st.tuples(
    st.sampled_from(["write", "write", "link", "remove", "chmod", "stage", "stage_all", "unstage"]),
    _NAME,
    st.binary(max_size=40),
)


def _clear_way(root: bytes, name: bytes) -> bytes:
    """Make room for a file: parents become directories, whatever has the name goes."""
    path = root
    for part in name.split(b"/")[:-1]:
        path = os.path.join(path, part)
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        os.makedirs(path, exist_ok=True)
    path = os.path.join(root, name)
    if os.path.isdir(path) and not os.path.islink(path):
        remove(Path(os.fsdecode(path)))
    elif os.path.lexists(path):
        os.unlink(path)
    return path


def _apply(repository: Path, step: tuple[str, bytes, bytes]) -> None:
    what, name, content = step
    root = os.fsencode(repository)
    path = os.path.join(root, name)
    if what == "write":
        with open(_clear_way(root, name), "wb") as f:
            f.write(content)
    elif what == "link":
        os.symlink(content.replace(b"\0", b"0") or b"x", _clear_way(root, name))
    elif what == "remove" and os.path.lexists(path):
        _clear_way(root, name)
    elif what == "chmod" and os.path.isfile(path) and not os.path.islink(path):
        os.chmod(path, os.stat(path).st_mode ^ 0o111)
    elif what == "stage":
        git(repository, "add", "-A", "--", b":(literal)" + name, check=False)
    elif what == "stage_all":
        git(repository, "add", "-A")
    elif what == "unstage":
        git(repository, "rm", "-q", "--cached", "-r", "--", b":(literal)" + name, check=False)


@pytest.mark.timeout(120)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    commits=st.lists(st.lists(_STEP, max_size=6), min_size=1, max_size=3),
    changes=st.lists(_STEP, max_size=8),
    include_untracked=st.booleans(),
)
def test_copy_has_the_same_commit_and_the_same_uncommitted_changes(
    commits: list[list[tuple[str, bytes, bytes]]],
    changes: list[tuple[str, bytes, bytes]],
    include_untracked: bool,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        repository = make_repository(work / "source")
        for steps in commits:
            for step in steps:
                _apply(repository, step)
            commit(repository)
        write(repository, "always", "changed")
        for step in changes:
            _apply(repository, step)
        before = status(repository)
        shipped = ship(repository, work, ShipOptions(include_untracked=include_untracked))
        assert status(repository) == before
        expected = reference(repository, work / "reference", include_untracked=include_untracked)
        assert head(shipped.copy) == head(repository)
        assert tracked_files(shipped.copy) == tracked_files(expected)
        assert status(shipped.copy) == status(expected)
        assert shipped.git("diff", "--binary") == git(expected, "diff", "--binary")
        assert shipped.fsck() == "0"
        assert shipped.git("log", "--format=%H") == git(repository, "log", "--format=%H")
        assert sorted(tracked_files(shipped.copy)) == shipped.names
        assert shipped.result.file_count == len(shipped.names)
        git(shipped.copy, "add", "--all", "--force")
        assert shipped.git("write-tree").decode().strip() == shipped.result.tree_id
