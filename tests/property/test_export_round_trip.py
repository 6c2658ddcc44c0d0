"""Random work is done in a guest and brought back; git on the host says what it was.

The guest is a directory of this host behind the real agent, so an example takes tenths of a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.workspace.export import find_changes, open_source_ground
from banger.workspace.landed import HostFacts, apply_changes, read_changes, write_changes
from banger.workspace.options import Mode, ShipOptions
from fakes.guest_files import GuestHost
from workspace_kit import (
    ENVIRONMENT,
    commit,
    git,
    head,
    make_repository,
    remove,
    ship,
    status,
    tracked_files,
    write,
)
from workspace_steps import FILE_STEPS, GIT_STEPS, SOAK, Step, apply_step, steps

_EXAMPLES = settings(
    max_examples=15 * SOAK,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
_MODES = st.sampled_from(["shallow_overlay", "metadata_only", "full_copy"])
pytestmark = pytest.mark.timeout(600 * SOAK)


class Case:
    """One example: a repository with commits, and a guest of its own."""

    def __init__(self, guests: GuestHost, commits: list[list[Step]], *, has_git: bool) -> None:
        self.work = Path(tempfile.mkdtemp(dir=guests.root))
        (self.work / "guest").mkdir()
        self.guest = GuestHost(guests.agent, self.work, git=has_git)
        self.source = make_repository(self.work / "source")
        write(self.source, "always", "here\n")
        commit(self.source)
        for made in commits:
            for step in made:
                apply_step(self.source, step)
            commit(self.source)
        git(self.source, "clean", "-qfdx")

    @property
    def copy(self) -> Path:
        return self.guest.path()

    def close(self) -> None:
        remove(self.work)

    def frozen(self) -> dict[bytes, object]:
        """All that an export must leave alone: every file of the guest, `.git` included."""
        return _everything(self.copy)

    def expected(self) -> tuple[str, dict[bytes, object]]:
        """What git itself takes the guest's tree for, on a copy of it."""
        judge = self.work / "judge"
        shutil.copytree(self.copy, judge, symlinks=True)
        git(judge, "add", "-A")
        tree = git(judge, "write-tree").decode().strip()
        listed = git(judge, "ls-tree", "-r", "-z", "--name-only", tree).split(b"\0")[:-1]
        files = tracked_files(judge)
        remove(judge)
        return tree, {name: files[name] for name in listed}

    def clone(self, base: str) -> Path:
        clone = self.work / "clone"
        subprocess.run(
            ["git", "clone", "-q", "--no-checkout", self.source, clone], env=ENVIRONMENT, check=True
        )
        git(clone, "checkout", "-q", "--detach", base)
        return clone


def _everything(root: Path) -> dict[bytes, object]:
    found: dict[bytes, object] = {}
    for directory, _, files in os.walk(os.fsencode(root)):
        for base in files:
            path = os.path.join(directory, base)
            st_ = os.lstat(path)
            found[path] = (st_.st_mode, st_.st_size, st_.st_mtime_ns, st_.st_ino)
    return found


def _fits(repository: Path, patch: bytes) -> None:
    if patch:
        git(repository, "apply", "--binary", "--index", "--whitespace=nowarn", stdin=patch)


@_EXAMPLES
@given(
    commits=st.lists(steps(FILE_STEPS, 6), max_size=3),
    edits=steps((*FILE_STEPS, *FILE_STEPS, *GIT_STEPS), 10),
    plain_edits=steps(FILE_STEPS, 10),
    mode=_MODES,
    has_git=st.booleans(),
)
def test_work_in_the_guest_comes_back_as_it_was_done(
    guests: GuestHost,
    commits: list[list[Step]],
    edits: list[Step],
    plain_edits: list[Step],
    mode: Mode,
    has_git: bool,
) -> None:
    case = Case(guests, commits, has_git=has_git)
    try:
        case.guest.prepare(case.source, ShipOptions(mode=mode))
        assert case.guest.patch(case.source)[0] == b""
        assert case.guest.changes(case.source) == []
        for step in edits if has_git else plain_edits:
            apply_step(case.copy, step)
        before = case.frozen()
        patch, exported = case.guest.patch(case.source)
        assert case.frozen() == before
        tree, files = case.expected()
        assert exported.base_commit == head(case.source)
        clone = case.clone(head(case.source))
        _fits(clone, patch)
        assert git(clone, "write-tree").decode().strip() == tree
        assert tracked_files(clone) == files
        # The same by `apply`, on the user's own files.
        where = case.guest.source(case.source, None)
        with open_source_ground(where) as ground:
            stream = BytesIO()
            write_changes(ground.work, find_changes(where, ground)[0], stream)
        stream.seek(0)
        apply_changes(HostFacts(case.source, "sha1", True), read_changes(stream), stream)
        assert tracked_files(case.source) == files
    finally:
        case.close()


@_EXAMPLES
@example(
    commits=[[("write", b"a/b", b"")]],
    edits=[("write", b"a", b"")],
    mode="shallow_overlay",
    readonly=False,
    untracked=True,
)
@given(
    commits=st.lists(steps(FILE_STEPS, 6), max_size=2),
    edits=steps((*FILE_STEPS, *FILE_STEPS, *GIT_STEPS), 10),
    mode=_MODES,
    readonly=st.booleans(),
    untracked=st.booleans(),
)
def test_second_prepare_leaves_what_a_first_one_would(
    guests: GuestHost,
    commits: list[list[Step]],
    edits: list[Step],
    mode: Mode,
    readonly: bool,
    untracked: bool,
) -> None:
    case = Case(guests, commits, has_git=True)
    try:
        case.guest.prepare(case.source, ShipOptions(mode=mode))
        own = write(case.copy, "own-file-of-the-guest", "kept")
        for step in edits:
            apply_step(case.source, step)
        options = ShipOptions(
            mode=mode, readonly=readonly,
            include_untracked=untracked and mode == "shallow_overlay",
        )  # fmt: skip
        again = case.guest.prepare(case.source, options)
        assert own.read_text() == "kept"
        own.unlink()
        fresh = ship(case.source, case.work, options)
        assert tracked_files(case.copy) == tracked_files(fresh.copy)
        assert head(case.copy) == head(fresh.copy)
        assert status(case.copy) == status(fresh.copy)
        for copy in (case.copy, fresh.copy):
            assert copy.stat().st_mode & 0o222 == (0 if readonly else 0o200)
        assert again.manifest.workspace.tree_id == fresh.result.tree_id
        done = subprocess.run(
            ["git", "-C", case.copy, "fsck", "--strict", "--no-dangling"],
            env=ENVIRONMENT, capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b""), done.stderr
        # Whatever it remembers now is true: nothing looks changed.
        assert case.guest.changes(case.source) == []
        assert case.guest.prepare(case.source, options).sent == 0
    finally:
        case.close()


@_EXAMPLES
@given(
    commits=st.lists(steps(FILE_STEPS, 6), max_size=2),
    here=steps((*FILE_STEPS, "commit"), 5),
    there=steps((*FILE_STEPS, "commit"), 5),
)
def test_second_prepare_loses_nothing_that_was_done_in_the_guest(
    guests: GuestHost, commits: list[list[Step]], here: list[Step], there: list[Step]
) -> None:
    case = Case(guests, commits, has_git=True)
    try:
        case.guest.prepare(case.source)
        for step in there:
            apply_step(case.copy, step)
        changed = {c.name: c.after for c in case.guest.changes(case.source)}
        commits_there = git(case.copy, "rev-list", "--all").split()
        for step in here:
            apply_step(case.source, step)
        before = case.frozen()
        try:
            case.guest.prepare(case.source)
        except BangerError as e:
            assert e.reason == "changed_in_guest"
            assert case.frozen() == before
            return
        after = tracked_files(case.copy)
        for name, content in changed.items():
            assert (name in after) == (content is not None)
        assert set(commits_there) <= set(git(case.copy, "rev-list", "--all").split()) | set(
            git(case.source, "rev-list", "--all").split()
        )
    finally:
        case.close()
