"""How banger runs git: never with anything that a repository could make it start.

The repository is hostile input. Two runners exist, both living as long as the object that made
them, both through `banger.process`:

- `source_git` reads the user's repository. It is for the few commands that start nothing by
  themselves (`rev-parse`, `symbolic-ref`, `config --list`, `ls-files` without `-m`,
  `for-each-ref`); hooks and fsmonitor are off besides, and every transport is forbidden, so that a
  missing object of a partial clone is an error and not a download.
- `scratch_git` works in a git directory of our own that borrows the user's objects
  (`objects/info/alternates`). The repository's configuration is not read at all: no filter,
  diff driver, alias or hook of it exists there.

Not to be used on the user's repository: `status`, `diff`, `diff-files`, `ls-files -m` (clean
filters, also for entries that are merely racy), `archive` and `checkout` (smudge filters).
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from banger import process
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CALL_TIMEOUT_S = 300.0
"""A git call that lists or resolves; a `.gitignore` that is a FIFO would block it for ever."""

_OPTIONS = (
    "--no-pager",
    "--no-replace-objects",
    "-c", "core.fsmonitor=false",
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.untrackedCache=false",
    "-c", "core.alternateRefsCommand=",
    "-c", "core.sshCommand=false",
    "-c", "core.askPass=",
    "-c", "credential.helper=",
    "-c", "submodule.recurse=false",
    # Else a pack is mapped as a whole, and a file of 2 GB in it counts as memory of 2 GB.
    "-c", "core.packedGitWindowSize=32m",
    "-c", "core.packedGitLimit=256m",
    "-c", "gc.auto=0",
    "-c", "maintenance.auto=false",
)  # fmt: skip

_LITERAL = "--literal-pathspecs"

_ENVIRONMENT = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    # No file, not even an empty one, which would make git print advice.
    "GIT_GRAFT_FILE": "/dev/null/none",
    # git >= 2.45 honours this one. Before, a missing object of a partial clone starts `git fetch`,
    # which the empty list of protocols stops before any transport begins; unlike `protocol.allow`
    # no configuration overrides it (git(1), GIT_ALLOW_PROTOCOL).
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_SSH_COMMAND": "false",
    "GIT_ASKPASS": "",
    "GIT_EDITOR": "false",
    "GIT_PAGER": "cat",
}


def never() -> bool:
    """The answer of a caller that cannot be cancelled."""
    return False


class Git:
    """A git with fixed options and environment in one place."""

    def __init__(
        self, place: tuple[str, ...], environment: Mapping[str, str], *, literal: bool = True
    ) -> None:
        options = (*_OPTIONS, *((_LITERAL,) if literal else ()))
        self._argv = (process.get_program("git", package="git"), *options, *place)
        self._environment = {**_ENVIRONMENT, **environment}

    def try_run(self, *args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run git and return whatever came of it; the caller reads the status.

        Raises:
            BangerError: git is missing, or did not end within `CALL_TIMEOUT_S`.
        """
        return process.run(
            (*self._argv, *args),
            stdin=stdin,
            env=self._environment,
            timeout_s=CALL_TIMEOUT_S,
            check=False,
        )

    def run(self, *args: str, doing: str, stdin: bytes | None = None) -> bytes:
        """Run git and return its standard output.

        Raises:
            BangerError: it failed: `doing`, and git's own words.
        """
        done = self.try_run(*args, stdin=stdin)
        if done.returncode != 0:
            raise failure(doing, done.stderr, done.returncode)
        return done.stdout

    def popen(
        self,
        *args: str,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start git; the caller owns the process."""
        return process.popen(
            (*self._argv, *args),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=self._environment,
        )


def source_git(directory: Path) -> Git:
    """Git on the user's repository that holds `directory`. See the module's list of commands."""
    return Git(("-C", str(directory)), {})


def scratch_git(git_dir: Path, work_tree: Path, *, literal: bool = True) -> Git:
    """Git in our own git directory, without system, user or repository configuration.

    `literal` False is for `check-ignore`, which knows no literal pathspecs: give it `./NAME`.
    """
    return Git(
        ("--git-dir", str(git_dir), "--work-tree", str(work_tree)),
        {
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            # git < 2.32 does not know GIT_CONFIG_GLOBAL.
            "HOME": str(git_dir),
            "XDG_CONFIG_HOME": str(git_dir),
        },
        literal=literal,
    )


def failure(doing: str, stderr: bytes, status: int) -> BangerError:
    """The error for a git that ended badly while `doing`; only the end of its words is kept."""
    words = stderr[-2048:].decode(errors="replace").strip()
    return BangerError("operation_failed", f"{doing}: {words or f'git ended with status {status}'}")


def cancellation(doing: str) -> BangerError:
    """The error of a call whose caller has gone."""
    return BangerError("operation_failed", f"{doing}: cancelled", reason="cancelled")


def await_exit(p: subprocess.Popen[bytes], *, cancelled: Callable[[], bool], doing: str) -> int:
    """Wait for a process we started, asking four times a second whether that is still wanted.

    Raises:
        BangerError: reason `cancelled`; the process is then killed and reaped by its owner.
    """
    while True:
        try:
            return p.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            if cancelled():
                raise cancellation(doing) from None


def end(p: subprocess.Popen[bytes]) -> None:
    """Kill and reap a process if it still runs, and close our ends of its pipes."""
    if p.poll() is None:
        p.kill()
    for pipe in (p.stdin, p.stdout, p.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    p.wait()
