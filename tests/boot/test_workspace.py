"""Workspaces in a real VM: put there, worked on, brought back, brought up to date."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boot.installation import SMALL, Installation
from workspace_kit import commit, git, head, make_repository, tracked_files, write
from workspace_steps import FILE_STEPS, SOAK, Step, apply_step, steps

# Modes, a symlink, a binary file, a rename, a deletion, an odd name, an ignored file.
_WORK = r"""
set -e
chmod 755 message; ln -sf run.sh link; head -c 3000 /dev/urandom > blob; mv sub/file sub/renamed
rm run.sh; printf 'new\r\n' > "$(printf 'odd\n"name')"; echo secret > ignored; mkdir empty
"""


@pytest.fixture(scope="module")
def vm(banger: Installation) -> Iterator[str]:
    banger.ok("vm", "create", "--name", "desk", *SMALL)
    yield "desk"
    banger("vm", "delete", "desk")


@pytest.fixture
def clean(repository: Path) -> Path:
    """The repository without uncommitted changes."""
    subprocess.run(["git", "checkout", "-q", "--", "."], cwd=repository, check=True)
    for name in ("untracked", "ignored"):
        (repository / name).unlink()
    return repository


def _git(where: Path, *words: str, stdin: bytes | None = None) -> bytes:
    return subprocess.run(
        ["git", "-c", "user.name=T", "-c", "user.email=t@example.invalid", *words],
        cwd=where, input=stdin, check=True, capture_output=True,
    ).stdout  # fmt: skip


def test_work_without_git_in_the_guest_comes_back_and_goes_on(
    banger: Installation, vm: str, clean: Path, tmp_path: Path
) -> None:
    banger.ok("vm", "workspace", "prepare", vm, str(clean))
    assert banger.ok("vm", "workspace", "export", vm).out == b""
    banger.ok("vm", "exec", vm, "--", "sh", "-c", _WORK)
    patch = banger.ok("vm", "workspace", "export", vm).out
    assert banger.ok("vm", "workspace", "diff", vm).out == patch
    clone = tmp_path / "clone"
    _git(tmp_path, "clone", "-q", str(clean), str(clone))
    _git(clone, "apply", "--binary", "--index", stdin=patch)
    # The guest's own files are the judge, fetched by another way.
    banger.ok("vm", "cp", f"{vm}:/root/repo", str(tmp_path / "back"))
    (tmp_path / "back/ignored").unlink()
    (tmp_path / "back/empty").rmdir()
    for one in (clone, tmp_path / "back"):
        shutil.rmtree(one / ".git")
    differing = subprocess.run(
        ["diff", "-r", "--no-dereference", str(clone), str(tmp_path / "back")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert differing.stdout == ""
    assert os.access(clone / "message", os.X_OK)
    # The same to the user's files, and then forwards: neither side loses anything.
    banger.ok("vm", "workspace", "apply", vm, "--check")
    banger.ok("vm", "workspace", "apply", vm)
    assert b"renamed" in _git(clean, "status", "--porcelain", "-uall")
    _git(clean, "add", "-A")
    _git(clean, "commit", "-qm", "from the guest")
    stale = banger.ok("vm", "exec", vm, "--", "true")
    assert "--auto-prepare" in stale.err
    (clean / "message").write_text("next\n")
    done = banger.ok("vm", "exec", "--auto-prepare", vm, "--", "sh", "-c", "cat message ignored")
    assert (done.out, done.err) == (b"next\nsecret\n", "")
    banger.ok("vm", "exec", vm, "--", "sh", "-c", "echo mine > message")
    (clean / "message").write_text("theirs\n")
    refused = banger("vm", "exec", "--auto-prepare", vm, "--", "cat", "message")
    assert refused.status == 1 and "message" in refused.err
    assert banger.ok("vm", "exec", vm, "--", "cat", "message").out == b"mine\n"


def test_commits_made_in_the_guest_come_back_as_commits(
    banger: Installation, vm: str, clean: Path, tmp_path: Path
) -> None:
    place = "/root/second"
    banger.ok("vm", "workspace", "prepare", vm, str(clean), "--guest-path", place)
    git = shutil.which("git")
    assert git is not None
    # The image has none; this host's runs there where both are of one distribution.
    banger.ok("vm", "cp", str(Path(git).resolve()), f"{vm}:/usr/local/bin/git")
    if banger("vm", "exec", vm, "--", "git", "--version").status != 0:
        pytest.skip("this host's git does not run in the guest's image")
    commit = "echo more >> message && git commit -qam 'In the guest' && echo later >> message"
    banger.ok("vm", "exec", "--guest-path", place, vm, "--", "sh", "-c", commit)
    export = ("vm", "workspace", "export", vm, "--guest-path", place)
    everything = banger.ok(*export).out
    assert everything.count(b"\n+") == 3  # the header's and both lines
    assert banger.ok(*export, "--base-commit", "HEAD").out.count(b"\n+") == 2
    bundle = tmp_path / "work.bundle"
    told = banger.ok(*export, "--format", "commits", "-o", str(bundle))
    assert "1 commit" in told.err
    _git(clean, "pull", "-q", "--ff-only", str(bundle))
    assert _git(clean, "log", "-1", "--format=%s") == b"In the guest\n"
    # What the guest committed, the host has: nothing is lost, nothing is refused.
    (clean / "run.sh").write_text("#!/bin/sh\n")
    refused = banger("vm", "workspace", "prepare", vm, str(clean), "--guest-path", place)
    assert refused.status == 1 and "message" in refused.err
    banger.ok("vm", "workspace", "prepare", vm, str(clean), "--guest-path", place, "--force")
    out = banger.ok(
        "vm", "exec", "--guest-path", place, vm, "--", "git", "status", "--porcelain"
    ).text
    assert out == " M run.sh\n"


@pytest.mark.timeout(1800 * SOAK)
@settings(
    max_examples=3 * SOAK, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(
    commits=st.lists(steps(FILE_STEPS, 8), min_size=1, max_size=2),
    edits=steps(FILE_STEPS, 12),
    mode=st.sampled_from(["shallow_overlay", "metadata_only", "full_copy"]),
)
def test_a_sample_of_random_work_comes_back_as_it_was_done(
    banger: Installation, vm: str, commits: list[list[Step]], edits: list[Step], mode: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, done = make_repository(Path(directory, "source")), Path(directory, "done")
        write(source, "always", "here\n")
        for made in commits:
            for step in made:
                apply_step(source, step)
            commit(source)
        git(source, "clean", "-qfdx")
        place = f"/root/{Path(directory).name}"
        where = ("--guest-path", place)
        banger.ok("vm", "workspace", "prepare", vm, str(source), *where, "--mode", mode)
        assert banger.ok("vm", "workspace", "export", vm, *where).out == b""
        # The work is done here, where git can judge it, and the guest gets its result.
        shutil.copytree(source, done, symlinks=True)
        for step in edits:
            apply_step(done, step)
        git(done, "add", "-A")
        tree = git(done, "write-tree").decode().strip()
        files = tracked_files(done)
        shutil.rmtree(done / ".git")
        clear = "find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf {} +"
        banger.ok("vm", "exec", *where, vm, "--", "sh", "-c", clear)
        banger.ok("vm", "cp", "-q", f"{done}/.", f"{vm}:{place}")
        patch = banger.ok("vm", "workspace", "export", vm, *where).out
        clone = Path(directory, "clone")
        git(source, "clone", "-q", str(source), str(clone))
        git(clone, "checkout", "-q", "--detach", head(source))
        if patch:
            git(clone, "apply", "--binary", "--index", "--whitespace=nowarn", stdin=patch)
        assert git(clone, "write-tree").decode().strip() == tree
        back = Path(directory, "back")
        banger.ok("vm", "cp", "-q", f"{vm}:{place}", str(back))
        assert tracked_files(back) == files
        banger.ok("vm", "exec", "--guest-path", "/", vm, "--", "rm", "-rf", place)
