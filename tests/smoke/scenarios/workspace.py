"""Repositories in guests. All use one fixture repository, made when the first of them asks."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import banger, expect
from tests.smoke.registry import scenario


@cache
def repository() -> Path:
    """The owner's repository: two commits, an edit, an untracked and an ignored file.

    Made once on each host; no scenario may change it.
    """
    path = banger.home / "repo"
    path.mkdir()
    files = {
        "Makefile": 'test:\n\t@cat "a file"; pwd; ls -a\n',
        ".gitignore": "ignored\n",
        "a file": "first\n",
    }
    for name, text in files.items():
        (path / name).write_text(text)
    for entry in (path, *path.iterdir()):
        _give(entry)
    _git("init", "-q", "-b", "main")
    _git("add", ".")
    _git("commit", "-q", "-m", "first")
    (path / "later").write_text("second\n")
    _give(path / "later")
    _git("add", ".")
    _git("commit", "-q", "-m", "second")
    (path / "a file").write_text("edited\n")
    for name in ("untracked", "ignored"):
        (path / name).write_text("not in git\n")
        _give(path / name)
    return path


def _give(path: Path) -> None:
    shutil.chown(path, banger.user, banger.user)


# The small image has no git; what git wrote can be read all the same.
_SHOW_HEAD = "cat .git/HEAD .git/packed-refs"


def _git(*arguments: str) -> str:
    identity = ("-c", "user.name=smoke", "-c", "user.email=smoke@host")
    done = banger.run("git", "-C", str(banger.home / "repo"), *identity, *arguments)
    expect(done.status == 0, f"git {arguments[0]}: {done.err}")
    return done.out


@scenario("repodir", "tracked files and their edits reach /root/repo, with the same HEAD")
def workspace_run() -> None:
    head = _head("HEAD")
    script = f"make test; {_SHOW_HEAD}"
    out = banger("vm", "run", "--rm", str(repository()), "--", "sh", "-c", script)
    lines = out.splitlines()
    expect(lines[:2] == ["edited", "/root/repo"], f"stdout is {out!r}")
    expect("ref: refs/heads/main" in lines, f"the guest's HEAD is {lines[-2:]}")
    expect(f"{head} refs/heads/main" in lines, f"the guest's commit is {lines[-2:]}")
    expect(not {"untracked", "ignored"} & set(lines), "a file was shipped that git does not track")


def _head(ref: str) -> str:
    repository()
    return _git("rev-parse", ref).strip()


@scenario("repodir", "lists the files that would go, and makes no VM")
def workspace_dryrun() -> None:
    before = banger.vm_names()
    out = banger("vm", "run", "--dry-run", str(repository()))
    expect(
        sorted(out.splitlines()) == [".gitignore", "Makefile", "a file", "later"],
        f"stdout is {out!r}",
    )
    out = banger("vm", "run", "--dry-run", "--include-untracked", str(repository()))
    expect("untracked" in out.splitlines(), f"stdout is {out!r}")
    expect(banger.vm_names() == before, "a VM was made")


@scenario("repodir", "untracked files go along with the flag, ignored ones never")
def include_untracked() -> None:
    out = banger("vm", "run", "--rm", "--include-untracked", str(repository()), "--", "ls")
    expect("untracked" in out.splitlines(), f"stdout is {out!r}")
    expect("ignored" not in out.splitlines(), "an ignored file was shipped")


@scenario("repodir", "`--branch` and `--from`: a new branch on an older commit in the guest")
def workspace_branch() -> None:
    base = _head("HEAD~1")
    arguments = ("--branch", "topic", "--from", "HEAD~1", str(repository()))
    out = banger("vm", "run", "--rm", *arguments, "--", "sh", "-c", f"{_SHOW_HEAD}; ls; cat a*")
    expect("ref: refs/heads/topic" in out, f"stdout is {out!r}")
    expect(f"{base} refs/heads/topic" in out, f"the branch is elsewhere: {out!r}")
    expect("later" not in out.splitlines(), "a file of the newer commit is there")
    expect("edited" in out.splitlines(), "the edit did not go along")


@scenario("repodir", "`-d` with `--rm` or a command is refused; alone it leaves a usable VM")
def detach_run() -> None:
    before = banger.vm_names()
    banger.refused("vm", "run", "-d", "--rm", status=2)
    banger.refused("vm", "run", "-d", "--", "true", status=2)
    expect(banger.vm_names() == before, "a refused call left a VM")
    guests.used_names.add("detached")
    banger("vm", "run", "-d", "--name", "detached", str(repository()))
    out = banger("vm", "exec", "detached", "--", "sh", "-c", "pwd; cat 'a file'")
    expect(out == "/root/repo\nedited\n", f"stdout is {out!r}")
    banger("vm", "delete", "detached")


@scenario("repodir", "what was written to the workspace just before stop is there after start")
def workspace_restart() -> None:
    guests.used_names.add("kept")
    banger("vm", "run", "-d", "--name", "kept", str(repository()))
    banger("vm", "exec", "kept", "--", "sh", "-c", "echo late > marker")
    banger("vm", "stop", "kept")
    banger("vm", "start", "kept")
    out = banger("vm", "exec", "kept", "--", "sh", "-c", "pwd; cat marker 'a file'")
    expect(out == "/root/repo\nlate\nedited\n", f"stdout is {out!r}")
    banger("vm", "delete", "kept")
