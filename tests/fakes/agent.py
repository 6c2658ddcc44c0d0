"""The guest agent itself, serving on this host: the real program behind a Unix socket.

It ends with the context. Where it was not built the test is skipped, naming it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.config.resources import agent_binary
from banger.errors import BangerError
from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
TOKEN = "a" * 64
VM_ID = "a" * 32
# Says that it is ready, and ends by any signal. A shell would not do: a signal that comes just
# before it starts its next program is lost, there as on every terminal. Nor would Python's own
# handler of SIGINT, which is not asked any more once the sleep has begun.
WAITING = (
    sys.executable, "-I", "-S", "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "print('ready', flush=True); time.sleep(60)",
)  # fmt: skip


def find_agent() -> Path:
    """The agent's program. Skips the test where there is none."""
    try:
        return agent_binary()
    except BangerError as e:
        pytest.skip(str(e))


class Agent:
    """One running agent. Its commands run as children of it, as ourselves."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.directory = directory
        self.socket = directory / "agent"
        self._program = program
        self._accounts = directory / "root"
        self._make_accounts()
        config = directory / "config.json"
        config.write_text(
            json.dumps({"schema": 1, "vm_id": VM_ID, "name": "web", "hostname": "web"})
        )
        self.process = self._start()

    def _make_accounts(self) -> None:
        """This host's accounts with a home of our own: nobody's profile is run by a test."""
        home = self.directory / "home"
        home.mkdir()
        (self._accounts / "etc").mkdir(parents=True)
        (self._accounts / "bin").mkdir()
        for shell in ("bash", "sh"):
            (self._accounts / "bin" / shell).symlink_to(f"/bin/{shell}")
        (self._accounts / "etc" / "group").symlink_to("/etc/group")
        me = os.geteuid()
        rows = []
        for row in Path("/etc/passwd").read_text().splitlines():
            fields = row.split(":")
            if int(fields[2]) == me:
                fields[5], fields[6] = str(home), "/bin/bash"
            rows.append(":".join(fields))
        (self._accounts / "etc" / "passwd").write_text("\n".join(rows) + "\n")

    def restart(self) -> None:
        """The agent ends, and only it; another one comes in its place."""
        self.process.kill()
        self.process.wait()
        for name in ("agent", "host"):
            (self.directory / name).unlink()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        directory = self.directory
        announced = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        announced.bind(str(directory / "host"))
        announced.listen(1)
        announced.settimeout(PATIENCE_S)
        process = subprocess.Popen(
            [self._program, "serve", "--listen", f"unix:{self.socket}",
             "--config", directory / "config.json",
             "--announce", f"unix:{directory / 'host'}", "--sessions", directory / "sessions",
             "--root", self._accounts],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        # Its announcement says that it listens.
        with announced, announced.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b'{"result":{"time_unix_ns":0}}\n')
        return process

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.socket))
        return sock

    def run(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """`banger.cli.stream.run` in a process of its own, over a connection to this agent.

        Options of the guest process (`tty`, `cwd`, `machine_pid`, …); those named `std…` are
        Popen's.
        """
        pipes = {k: options.pop(k) for k in list(options) if k.startswith("std")}
        document = {"socket": str(self.socket), "argv": argv, **options}
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_command.py")), json.dumps(document)],
            env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
            **{
                "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                **pipes,
            },
        )  # fmt: skip

    def close(self) -> None:
        """Kill it as a machine's end would: at once, with the commands that it runs."""
        self.process.kill()
        self.process.wait()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)


@contextlib.contextmanager
def running_agent() -> Iterator[Agent]:
    """An agent that serves until the block ends."""
    program = find_agent()
    directory = Path(tempfile.mkdtemp(prefix="ba"))  # short, as sun_path is
    try:
        agent = Agent(directory, program)
        try:
            yield agent
        finally:
            agent.close()
    finally:
        shutil.rmtree(directory)
