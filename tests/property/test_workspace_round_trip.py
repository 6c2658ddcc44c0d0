"""Random repositories go through pack and GNU tar; git judges the copy."""

from __future__ import annotations

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
    ship,
    status,
    tracked_files,
    write,
)
from workspace_steps import SOAK, Step, apply_step, steps

_KINDS = ("write", "write", "link", "remove", "chmod", "stage", "stage_all", "unstage")


@pytest.mark.timeout(600 * SOAK)
@settings(max_examples=25 * SOAK, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    commits=st.lists(steps(_KINDS, 6), min_size=1, max_size=3),
    changes=steps(_KINDS, 8),
    include_untracked=st.booleans(),
)
def test_copy_has_the_same_commit_and_the_same_uncommitted_changes(
    commits: list[list[Step]],
    changes: list[Step],
    include_untracked: bool,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        repository = make_repository(work / "source")
        for steps in commits:
            for step in steps:
                apply_step(repository, step)
            commit(repository)
        write(repository, "always", "changed")
        for step in changes:
            apply_step(repository, step)
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
