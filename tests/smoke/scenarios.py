"""The smoke scenarios: a registry with one-line descriptions, and the functions that run them.

The runner outside reads the registry only; the functions run in the nested host, as root, with the
standard library only, against the installed `banger`. A scenario leaves the host as it found it:
one that does not, fails. Events are lines that start with `@`, everything else is log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.smoke import census

if TYPE_CHECKING:
    from collections.abc import Callable

Class = Literal["pure", "repodir", "global"]
# A call that hangs must not eat the run's whole time; the slowest one boots a guest twice.
_CALL_S = 300


@dataclass(frozen=True)
class Scenario:
    """`pure` scenarios share nothing, `repodir` ones a repository; `global` ones come last."""

    name: str
    kind: Class
    description: str
    run: Callable[[], None]


class Skipped(Exception):
    """The host lacks what the scenario needs; the text names it."""


SCENARIOS: list[Scenario] = []


def _scenario(kind: Class, description: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(run: Callable[[], None]) -> Callable[[], None]:
        SCENARIOS.append(Scenario(run.__name__, kind, description, run))
        return run

    return register


# What scenarios are made of


def banger(*arguments: str, status: int = 0, stdin: str = "") -> str:
    """Call banger, show the call in the log, check its status and return its stdout."""
    done = subprocess.run(
        [os.environ["BANGER"], *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=_CALL_S,
        check=False,
    )
    print(f"$ banger {' '.join(arguments)}\n{done.stderr}{done.stdout}", end="", flush=True)
    expect(done.returncode == status, f"status {done.returncode}, expected {status}")
    return done.stdout


def banger_json(*arguments: str) -> Any:
    """Call banger and decode what it prints."""
    return json.loads(banger(*arguments))


def expect(true: bool, otherwise: str) -> None:
    """Fail the scenario with a sentence."""
    if not true:
        raise AssertionError(otherwise)


def vm_names() -> list[str]:
    """The VMs that banger knows."""
    return banger("vm", "list", "--names").split()


# The scenarios, in the order in which they run


@_scenario("pure", "the first VM: `uname -a` of the guest on stdout, status 0, no VM left")
def uname() -> None:
    out = banger("vm", "run", "--rm", "--", "uname", "-a")
    expect(out.startswith("Linux "), f"stdout is {out!r}")
    expect(os.uname().release not in out, "that is the host's kernel")
    expect(vm_names() == [], "a VM is left over")


@_scenario("pure", "exit 42 gives 42; a command killed by SIGTERM gives 143")
def exit_code() -> None:
    banger("vm", "run", "--rm", "--", "sh", "-c", "exit 42", status=42)
    banger("vm", "run", "--rm", "--", "sh", "-c", "kill -TERM $$", status=143)


@_scenario("pure", "the VMM is a real firecracker, and says so in the record")
def firecracker_driver() -> None:
    banger("vm", "create", "--name", "fc")
    record = banger_json("vm", "show", "fc")
    expect(record["vmm"] == "firecracker", f"the record's vmm is {record['vmm']!r}")
    expect(record["state"] == "running", f"the record's state is {record['state']!r}")
    running = census.vmm_processes()
    expect(len(running) == 1 and "/firecracker" in running[0], f"VMM processes: {running}")
    banger("vm", "delete", "fc")


@_scenario("repodir", "a repository's tracked files and their edits are tested in the guest")
def workspace_run() -> None:
    with tempfile.TemporaryDirectory(prefix="smoke-") as directory:
        repository = Path(directory) / "repo"
        repository.mkdir()
        git = ["git", "-C", str(repository), "-c", "user.name=smoke", "-c", "user.email=smoke@host"]
        subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
        (repository / "Makefile").write_text('test:\n\t@grep edited "a file" && pwd && ls\n')
        (repository / "a file").write_text("committed\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
        (repository / "a file").write_text("edited\n")
        (repository / "untracked").write_text("stays here\n")
        out = banger("vm", "run", "--rm", str(repository), "--", "make", "test")
    lines = out.splitlines()
    expect(lines[:2] == ["edited", "/root/repo"], f"stdout is {out!r}")
    expect("untracked" not in lines, "an untracked file was shipped")


@_scenario("pure", "data on the work disk is there after stop and start, with a new boot id")
def stop_start() -> None:
    banger("vm", "create", "--name", "keep")
    banger("vm", "exec", "keep", "--", "sh", "-c", "echo kept > /root/data")
    before = banger_json("vm", "show", "keep")["boot_id"]
    banger("vm", "stop", "keep")
    record = banger_json("vm", "show", "keep")
    expect(record["state"] == "stopped", f"the record's state is {record['state']!r}")
    expect(census.vmm_processes() == [], "a VMM runs on after stop")
    banger("vm", "start", "keep")
    expect(banger("vm", "exec", "keep", "--", "cat", "/root/data") == "kept\n", "the data is gone")
    after = banger_json("vm", "show", "keep")["boot_id"]
    expect(after not in (None, before), f"boot id {before} before, {after} after")
    banger("vm", "delete", "keep")


@_scenario("global", "a VM outlives `kill -9` of the daemon, and a new one can use it")
def daemon_killed() -> None:
    banger("vm", "create", "--name", "survivor")
    boot_id = banger("vm", "exec", "survivor", "--", "cat", "/proc/sys/kernel/random/boot_id")
    daemon = int(banger_json("daemon", "status", "--json")["pid"])
    pidfd = os.pidfd_open(daemon)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    _wait_end(pidfd)
    again = banger("vm", "exec", "survivor", "--", "cat", "/proc/sys/kernel/random/boot_id")
    expect(again == boot_id, "the guest booted again")
    banger("vm", "delete", "survivor")


@_scenario("global", "after prune and daemon stop nothing of banger is left on the host")
def nothing_left() -> None:
    banger("vm", "create", "--name", "last", "--no-start")
    banger("vm", "prune", "-f")
    expect(vm_names() == [], "prune left a VM that does not run")
    daemon = os.pidfd_open(int(banger_json("daemon", "status", "--json")["pid"]))
    banger("daemon", "stop")
    _wait_end(daemon)
    # The kernel's own list: the helper ends with its daemon.
    left = [
        words
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if (words := _command_line(path)) and ("banger.daemon" in words or "banger_root" in words)
    ]
    expect(left == [], f"processes are left: {left}")


def _wait_end(pidfd: int) -> None:
    ready, _, _ = select.select([pidfd], [], [], 60)
    os.close(pidfd)
    expect(bool(ready), "the daemon did not end within 60 s")


def _command_line(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it ended just now
        return ""


# Running them


def run_scenario(scenario: Scenario, before: set[str]) -> str:
    """Run one scenario, then compare the host's census with `before`; pass, fail or skip."""
    log = _state() / "bangerd.log"
    log_start = log.stat().st_size if log.is_file() else 0
    try:
        scenario.run()
        left = sorted(census.take_census() - before)
        expect(not left, "left on the host: " + "; ".join(left))
    except Skipped as e:
        print(f"skipped: {e}")
        return "skip"
    except Exception:
        traceback.print_exc(file=sys.stdout)
        _show_evidence(log, log_start)
        _delete_all()
        return "fail"
    return "pass"


def _show_evidence(log: Path, log_start: int) -> None:
    """Print what the daemon logged since the scenario began, and the end of every console."""
    for path, start in [(log, log_start), *((c, 0) for c in _state().glob("vms/*/console.log"))]:
        if path.is_file():
            text = path.read_bytes()[start:][-6000:].decode(errors="replace")
            print(f"--- {path}\n{text}", flush=True)


def _delete_all() -> None:
    """Remove what the failed scenario left, so that the next one is judged by itself."""
    call = [os.environ["BANGER"], "vm", "list", "--names"]
    try:
        names = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
        for name in names.split():
            banger("vm", "delete", name)
    except (OSError, subprocess.SubprocessError, AssertionError) as e:
        print(f"cleaning up after the failure: {e}")


def _state() -> Path:
    return Path(os.environ["XDG_STATE_HOME"]) / "banger"


def main(names: list[str]) -> int:
    """Run the named scenarios (all when none is named) and report each one as an event line."""
    before = census.take_census()
    failed = False
    for scenario in SCENARIOS:
        if names and scenario.name not in names:
            continue
        _event({"start": scenario.name})
        started = time.monotonic()
        result = run_scenario(scenario, before)
        seconds = round(time.monotonic() - started, 1)
        _event({"end": scenario.name, "result": result, "seconds": seconds})
        failed |= result == "fail"
    return 1 if failed else 0


def _event(event: dict[str, object]) -> None:
    sys.stdout.flush()
    print(f"@event {json.dumps(event)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
