"""A banger of the tests' own: its state, runtime and bridge, with images from the shared cache.

Lives as long as the test session. Nothing of the user's own installation is touched; at the end
the daemon has ended and the host is as it was, or the session fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNEL = "debian-6.12-cloud"
IMAGE = "debian-bookworm-minimal"
# A watchdog, as in `patience`: whole lives of emulated machines, several side by side.
PATIENCE_S = 600.0
SMALL = ("--vcpu", "1", "--memory", "512M", "--disk-size", "512M", "--system-overlay-size", "512M")


@dataclass
class Done:
    """An ended command line."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


class Installation:
    """Runs the real `banger` program in an environment of its own."""

    def __init__(
        self, root: Path, *, bridge: str, address: str, wrapper: tuple[str, ...] = ()
    ) -> None:
        """`wrapper` is put in front of every command line."""
        self.root = root
        self.wrapper = wrapper
        self.state = root / "state" / "banger"
        self.runtime = root / "run" / "banger"
        self.bridge = bridge
        (root / "run").mkdir(mode=0o700)
        config = root / "config" / "banger"
        config.mkdir(parents=True)
        self.config = config / "config.toml"
        self.config.write_text(
            f'bridge_name = "{bridge}"\nbridge_ip = "{address}"\n'
            f'default_image_name = "{IMAGE}"\nlog_level = "debug"\n'
            'dns_listen_addr = "127.0.0.1:0"\n'
        )
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("BANGER_")},
            "XDG_STATE_HOME": str(root / "state"),
            "XDG_RUNTIME_DIR": str(root / "run"),
            "XDG_CONFIG_HOME": str(root / "config"),
            "XDG_CACHE_HOME": cache,
            "BANGER_MODE": "user",
        }

    def argv(self, *words: str) -> list[str]:
        return [*self.wrapper, sys.executable, "-m", "banger.cli.entry", *words]

    def popen(self, *words: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        kwargs.setdefault("stdout", subprocess.PIPE)
        kwargs.setdefault("stderr", subprocess.PIPE)
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(self.argv(*words), env=self.env, **kwargs)

    def __call__(
        self,
        *words: str,
        stdin: bytes | None = None,
        timeout_s: float = PATIENCE_S,
        cwd: Path | None = None,
    ) -> Done:
        p = self.popen(
            *words, stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL, cwd=cwd
        )
        try:
            out, err = p.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            p.kill()
            out, err = p.communicate()
            raise AssertionError(f"{words} hangs; stderr so far: {err.decode()}") from None
        return Done(p.returncode, out, err.decode(errors="replace"))

    def ok(self, *words: str, **kwargs: Any) -> Done:
        done = self(*words, **kwargs)
        assert done.status == 0, f"{words}: status {done.status}\n{done.err}\n{self.evidence()}"
        return done

    def json(self, *words: str, **kwargs: Any) -> Any:
        return json.loads(self.ok(*words, **kwargs).out)

    def show(self, vm: str) -> dict[str, Any]:
        record: dict[str, Any] = self.json("vm", "show", vm)
        return record

    def handles(self, vm: str) -> dict[str, Any]:
        path = self.state / "vms" / self.show(vm)["id"] / "handles.json"
        handles: dict[str, Any] = json.loads(path.read_text())
        return handles

    def daemon_pid(self) -> int:
        return int(self.json("daemon", "status", "--json")["pid"])

    def kill_daemon(self, pid: int | None = None) -> None:
        """As a crash would: no goodbye. Returns when it is gone.

        `pid`: who wants it to die in the middle of something asks for it before.
        """
        if pid is None:
            pid = self.daemon_pid()
        fd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            assert select.select([fd], [], [], PATIENCE_S)[0]
        finally:
            os.close(fd)

    def stop_daemon(self) -> None:
        """Let it end in order. It refuses while it is busy with what a client has left."""
        deadline = time.monotonic() + PATIENCE_S
        while (done := self("daemon", "stop")).status != 0:
            assert "under way" in done.err and time.monotonic() < deadline, done.err

    def wait_for_sshd(self, vm: str) -> None:
        """The announcement comes before sshd listens; `vm ports` shows when it does."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(p["port"] == 22 for p in self.json("vm", "ports", "--json", vm)):
            assert time.monotonic() < deadline, self.evidence()

    def census(self) -> dict[str, list[str]]:
        """Everything on the host that VMs of this installation hold."""
        links = json.loads(subprocess.check_output(["ip", "-j", "link", "show"]))
        mine = [
            link["ifname"]
            for link in links
            if link["ifname"] == self.bridge or link.get("master") == self.bridge
        ]
        processes = []
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit():
                try:
                    words = (directory / "cmdline").read_bytes().split(b"\0")
                    where = os.readlink(directory / "cwd")
                except OSError:
                    continue
                if where.startswith(str(self.runtime / "vms")):
                    processes.append(words[0].decode())
        return {
            "links": mine,
            "processes": processes,
            "sockets": sorted(p.name for p in (self.runtime / "vms").glob("*")),
            "directories": sorted(p.name for p in (self.state / "vms").glob("*")),
            "leases": sorted(p.name for p in (self.runtime / "leases").glob("*.json")),
            "rows": [vm["name"] for vm in self.json("vm", "list", "--json")],
        }

    def evidence(self) -> str:
        """The end of the daemon's log and of every console, for a failed test."""
        parts = []
        for path in [self.state / "bangerd.log", *self.state.glob("vms/*/console.log")]:
            if path.exists():
                parts.append(
                    f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:])
                )
        return "\n".join(parts)

    def furnish(self) -> None:
        """Kernel and image, from the shared cache where they were built before."""
        self.ok("kernel", "pull", KERNEL, timeout_s=900)
        self.ok("image", "build", "--name", IMAGE, "--recipe", IMAGE, timeout_s=1800)

    def close(self) -> None:
        names = self("vm", "list", "--names").text.split()
        if names:
            self("vm", "delete", *names)
        self.stop_daemon()
