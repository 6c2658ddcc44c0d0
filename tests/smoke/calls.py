"""How scenarios call banger, and the host's own tools, in the nested host.

Scenarios run as root so that they can look at everything; banger is called the way its user does:
as the installation's owner, without sudo, from a clean environment. Standard library only.
"""

from __future__ import annotations

import json
import os
import pwd
import select
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OWNER = "dev"
# A call that hangs must not eat the run's whole time; the slowest one boots a guest twice. Like the
# other limits here a watchdog: the host is emulated, on a machine that may have other work.
CALL_S = 600
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def expect(true: bool, otherwise: str) -> None:
    """Fail the scenario with a sentence."""
    if not true:
        raise AssertionError(otherwise)


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
    """Ask again and again, and fail with a sentence when it has not become true by then."""
    deadline = time.monotonic() + timeout_s
    while not true():
        expect(time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Done:
    """A finished call."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A user of an installed banger. Calls show themselves, their time and output in the log."""

    user: str
    program: str
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return Path(self.environment["HOME"])

    @property
    def environment(self) -> dict[str, str]:
        """What a login would set, and nothing of ours."""
        entry = pwd.getpwnam(self.user)
        return {"HOME": entry.pw_dir, "USER": self.user, "LOGNAME": self.user, "PATH": _PATH,
                "LANG": "C.UTF-8", "TERM": "dumb", **self.extra}  # fmt: skip

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program as this user; options as for Popen."""
        return subprocess.Popen(argv, **{**self._identity(), **options})

    def banger_started(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Start banger as this user; options as for Popen."""
        print(f"$ banger {shlex.join(arguments)} &", flush=True)
        return self.start(self.program, *arguments, **options)

    def run(self, *argv: str, stdin: str = "", **options: Any) -> Done:
        """Run a program as this user to its end."""
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            **{"timeout": CALL_S, **self._identity(), **options},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def done(self, *arguments: str, stdin: str = "", **options: Any) -> Done:
        """Call banger, whatever status it ends with."""
        started = time.monotonic()
        done = self.run(self.program, *arguments, stdin=stdin, **options)
        seconds = time.monotonic() - started
        print(f"$ banger {shlex.join(arguments)}  ({seconds:.1f} s, status {done.status})")
        print(f"{done.err}{done.out}", end="", flush=True)
        return done

    def __call__(self, *arguments: str, status: int = 0, stdin: str = "", **options: Any) -> str:
        """Call banger, check its status and return its stdout."""
        done = self.done(*arguments, stdin=stdin, **options)
        expect(done.status == status, f"status {done.status}, expected {status}")
        return done.out

    def refused(self, *arguments: str, status: int = 1, because: str = "", **options: Any) -> str:
        """Call banger, which must refuse and give the reason on stderr; return stderr."""
        done = self.done(*arguments, **options)
        expect(done.status == status, f"status {done.status}, expected {status}")
        expect(because in done.err, f"the message does not say {because!r}: {done.err!r}")
        return done.err

    def json(self, *arguments: str) -> Any:
        """Call banger and decode what it prints."""
        return json.loads(self(*arguments))

    def vm_names(self) -> list[str]:
        """The VMs that banger knows."""
        return self("vm", "list", "--names").split()

    def _identity(self) -> dict[str, Any]:
        entry = pwd.getpwnam(self.user)
        return {
            "env": self.environment,
            "cwd": self.home,
            "user": entry.pw_uid,
            "group": entry.pw_gid,
            "extra_groups": os.getgrouplist(self.user, entry.pw_gid),
            "umask": 0o022,
        }


banger = Caller(user=OWNER, program="/usr/local/bin/banger")


def host(*argv: str, status: int | None = 0, stdin: str = "") -> str:
    """Run one of the host's own tools as root and return its stdout."""
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=CALL_S, check=False
    )
    if status is not None:
        words = shlex.join(argv)
        expect(done.returncode == status, f"{words}: status {done.returncode}: {done.stderr}")
    return done.stdout


def units_active(*units: str) -> bool:
    """Whether systemd has all of them running and ready."""
    states = host("systemctl", "is-active", *units, status=None).split()
    return states == ["active"] * len(units)


def main_pid(unit: str) -> int:
    """The pid of a service's main process."""
    return int(host("systemctl", "show", "--value", "-p", "MainPID", unit))


def kill_and_wait(pid: int) -> None:
    """SIGKILL a process, and see it end."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ready, _, _ = select.select([pidfd], [], [], 300)
    finally:
        os.close(pidfd)
    expect(bool(ready), f"process {pid} did not end within 300 s of SIGKILL")
