"""Real repositories for the workspace tests, and the way a guest would receive them.

Everything is made with the git and tar programs, which are also the judges.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from banger.workspace.files import list_shipped
from banger.workspace.inspect import inspect_repository
from banger.workspace.options import ShipOptions, ShipResult
from banger.workspace.pack import pack

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
}


def git(where: Path, *args: str | bytes, stdin: bytes | None = None, check: bool = True) -> bytes:
    done = subprocess.run(
        ["git", "-C", where, *args],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=ENVIRONMENT,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"git {args}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def make_repository(where: Path, *args: str) -> Path:
    where.mkdir(parents=True)
    git(where, "init", "-q", "-b", "main", *args)
    git(where, "config", "user.name", "Ada")
    git(where, "config", "user.email", "ada@example.org")
    return where


def write(repository: Path, name: str | bytes, content: bytes | str = b"") -> Path:
    path = repository / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def commit(repository: Path, message: str = "change") -> str:
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "--allow-empty", "-m", message)
    return head(repository)


def make_project(where: Path) -> Path:
    """A repository with one commit of a few files: in a directory, executable, a link."""
    repository = make_repository(where)
    write(repository, "src/main.c", "int main;\n")
    write(repository, "src/old.c", "old\n")
    write(repository, "run.sh", "#!/bin/sh\n").chmod(0o755)
    (repository / "link").symlink_to("src/main.c")
    commit(repository, "first")
    return repository


def head(repository: Path) -> str:
    return git(repository, "rev-parse", "HEAD").decode().strip()


def status(repository: Path) -> list[bytes]:
    out = git(repository, "status", "--porcelain", "-z", "-uall", "--no-renames")
    return sorted(out.split(b"\0")[:-1])


def tracked_files(repository: Path) -> dict[bytes, object]:
    """What is in the work tree, without `.git`: names, x bits, link targets, content."""
    found: dict[bytes, object] = {}
    for directory, names, files in os.walk(os.fsencode(repository)):
        if b".git" in names:
            names.remove(b".git")
        for base in (*files, *(n for n in names if os.path.islink(os.path.join(directory, n)))):
            path = os.path.join(directory, base)
            name = os.path.relpath(path, os.fsencode(repository))
            if os.path.islink(path):
                found[name] = os.readlink(path)
            else:
                with open(path, "rb") as f:
                    found[name] = (bool(os.stat(path).st_mode & 0o100), f.read())
    return found


@dataclass(frozen=True, kw_only=True)
class Shipped:
    result: ShipResult
    copy: Path
    archive: Path
    names: list[bytes]

    def git(self, *args: str) -> bytes:
        return git(self.copy, *args)

    def fsck(self) -> str:
        done = subprocess.run(
            ["git", "-C", self.copy, "fsck", "--strict", "--no-dangling"],
            capture_output=True,
            env=ENVIRONMENT,
            check=False,
        )
        return f"{done.returncode} {(done.stdout + done.stderr).decode()}".strip()


def extract(archive: Path, target: Path) -> Path:
    target.mkdir()
    subprocess.run(["tar", "-C", target, "-xpf", archive], check=True)
    return target


def ship(path: Path, work: Path, options: ShipOptions | None = None) -> Shipped:
    """Inspect, list, pack, and unpack with GNU tar below `work`."""
    options = options or ShipOptions()
    number = len(list(work.glob("copy-*")))
    archive = work / f"workspace-{number}.tar"
    repository = inspect_repository(path)
    names = list_shipped(repository, options)
    with archive.open("wb") as out:
        result = pack(repository, options, out)
    copy = extract(archive, work / f"copy-{number}")
    return Shipped(result=result, copy=copy, archive=archive, names=names)


def reference(repository: Path, target: Path, *, include_untracked: bool) -> Path:
    """What the copy should look like, made with cp and git alone: the same files with the index
    set back to HEAD, without those that are not shipped."""
    subprocess.run(["cp", "-a", repository, target], check=True)
    ignored = git(target, "ls-files", "-z", "-o", "-i", "--exclude-standard").split(b"\0")[:-1]
    gone = set(ignored)
    if not include_untracked:
        gone |= set(git(target, "ls-files", "-z", "-o").split(b"\0")[:-1])
    for name in gone:
        os.unlink(os.path.join(os.fsencode(target), name))
    if git(target, "rev-parse", "-q", "--verify", "HEAD", check=False):
        git(target, "read-tree", "HEAD")
    else:
        (target / ".git/index").unlink(missing_ok=True)
    return target


def remove(path: Path) -> None:
    shutil.rmtree(path)
