"""The daemon as commands find it: started once, replaced when it is another, explained when absent.

Real daemons, in directories of the test's own; they make no VM and nothing on the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import __version__
from banger.config.paths import Paths
from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
# A daemon of an earlier version, which this one has to get along with.
_OLD_DAEMON = """
import sys, banger
banger.__version__ = "0.0.0-old"
sys.argv = ["bangerd", "--ready-fd", sys.argv[1]]
from banger.daemon.main import main
main()
"""


class Home:
    """A user's directories, and the commands of that user."""

    def __init__(self, root: Path) -> None:
        self.env = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "HOME": str(root),
            **{f"XDG_{name}_HOME": str(root / name.lower()) for name in
               ("STATE", "CACHE", "CONFIG")},
            "XDG_RUNTIME_DIR": str(root / "run"), "BANGER_MODE": "user",
        }  # fmt: skip
        self.paths = Paths(
            state=root / "state" / "banger", cache=root / "cache" / "banger",
            runtime=root / "run" / "banger", config_file=root / "config" / "banger" / "config.toml",
        )  # fmt: skip
        self.paths.config_file.parent.mkdir(parents=True)

    def popen(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "banger.cli.entry", *words],
            env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str, str]:
        p = self.popen(*words)
        out, err = p.communicate(timeout=PATIENCE_S)
        return p.returncode, out, err

    def daemons(self) -> list[int]:
        """The daemons of this user, by the socket's directory in their environment."""
        mark = f"XDG_RUNTIME_DIR={self.env['XDG_RUNTIME_DIR']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes()
                    if b"banger.daemon.main" in words:
                        found.append(int(entry.name))
        return found

    def start_old_daemon(self) -> subprocess.Popen[bytes]:
        self.paths.runtime.mkdir(parents=True, mode=0o700)
        ready, write = os.pipe()
        p = subprocess.Popen(
            [sys.executable, "-c", _OLD_DAEMON, str(write)], env=self.env, pass_fds=(write,),
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(write)
        assert select.select([ready], [], [], PATIENCE_S)[0]
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        return p

    def connect(self) -> socket.socket:
        """A connection on which nothing is asked: for the daemon it is work under way."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = os.open(self.paths.runtime, os.O_PATH)
        sock.connect(f"/proc/self/fd/{directory}/{self.paths.daemon_socket.name}")
        os.close(directory)
        return sock


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    deadline = time.monotonic() + PATIENCE_S
    # One that has not yet heard of its last client's end refuses.
    while (done := home.run("daemon", "stop"))[0] and "under way" in done[2]:
        assert time.monotonic() < deadline, done
    for pid in home.daemons():
        os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"daemon {pid} outlived its test")


def test_first_command_starts_the_daemon_and_the_next_finds_it(home: Home) -> None:
    assert home.run("vm", "list", "--names") == (0, "", "")
    (pid,) = home.daemons()
    assert home.run("vm", "list", "--names") == (0, "", "")
    assert home.daemons() == [pid]


def test_two_first_commands_at_once_start_one_daemon(home: Home) -> None:
    commands = [home.popen("vm", "list", "--json") for _ in range(3)]
    results = [command.communicate(timeout=PATIENCE_S) for command in commands]
    assert [json.loads(out) for out, _ in results] == [[], [], []]
    assert len(home.daemons()) == 1


def test_daemon_ends_on_request_and_takes_its_socket_along(home: Home) -> None:
    home.run("vm", "list")
    assert home.run("daemon", "stop") == (0, "", "")
    assert home.daemons() == []
    assert not home.paths.daemon_socket.exists()
    status, _, err = home.run("daemon", "stop")
    assert (status, err) == (0, "banger: the daemon is not running\n")


def test_socket_of_a_killed_daemon_is_no_obstacle(home: Home) -> None:
    home.run("vm", "list")
    (pid,) = home.daemons()
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([fd], [], [], PATIENCE_S)
    os.close(fd)
    assert home.paths.daemon_socket.exists()
    assert home.run("vm", "list", "--names") == (0, "", "")
    assert home.daemons() != [pid]


def test_idle_daemon_of_another_version_is_replaced(home: Home) -> None:
    old = home.start_old_daemon()
    assert home.run("vm", "list", "--names") == (0, "", "")
    assert old.wait(timeout=PATIENCE_S) == 0
    (pid,) = home.daemons()
    assert pid != old.pid


def test_busy_daemon_of_another_version_is_left_alone_and_named(home: Home) -> None:
    old = home.start_old_daemon()
    try:
        with home.connect():
            status, out, err = home.run("vm", "list")
            assert (status, out) == (1, "")
            assert "under way" in err
            assert old.poll() is None
    finally:
        old.terminate()
        old.wait(timeout=PATIENCE_S)


def test_daemon_that_cannot_start_gives_its_reason(home: Home) -> None:
    home.paths.config_file.write_text("vmn = 'qemu'\n")
    status, _, err = home.run("vm", "list")
    assert status == 1
    assert str(home.paths.config_file) in err
    assert "unknown field `vmn`; did you mean `vmm`?" in err
    assert "Traceback" not in err
    deadline = time.monotonic() + PATIENCE_S
    while home.daemons():  # its last words come before its end
        assert time.monotonic() < deadline


def test_configuration_that_is_mended_helps_at_once(home: Home) -> None:
    home.paths.config_file.write_text("nonsense")
    assert home.run("vm", "list")[0] == 1
    home.paths.config_file.unlink()
    assert home.run("vm", "list", "--names") == (0, "", "")


def test_runtime_directory_that_cannot_be_made_is_an_error_and_no_traceback(home: Home) -> None:
    Path(home.env["XDG_RUNTIME_DIR"]).write_text("a file")
    status, _, err = home.run("vm", "list")
    assert status == 1
    assert "making the directory" in err
    assert "Traceback" not in err
    Path(home.env["XDG_RUNTIME_DIR"]).unlink()


def test_state_directory_of_somebody_else_is_refused(home: Home) -> None:
    home.paths.state.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(home.paths.state, 12345, 12345)
    status, _, err = home.run("vm", "list")
    assert status == 1
    assert "belongs to uid 12345" in err


def test_status_says_which_daemon_answers(home: Home) -> None:
    status, out, err = home.run("daemon", "status", "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["version"] == __version__
    assert [answer["pid"]] == home.daemons()
    assert answer["socket"] == str(home.paths.daemon_socket)
    assert answer["vms_running"] == 0


def test_files_of_the_daemon_are_private(home: Home) -> None:
    home.run("vm", "list")
    for path in (home.paths.daemon_socket, home.paths.database, home.paths.daemon_log):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (home.paths.runtime, home.paths.state):
        assert path.stat().st_mode & 0o777 == 0o700, path
