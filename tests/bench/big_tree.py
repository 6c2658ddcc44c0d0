"""Figures of a large repository: 50,000 files, 500 MB, one commit; in, again, and back.

The other side is what one types without banger: `git clone` in the guest, through an ssh connection
(a port of it leads back to a git daemon on this host), then `rsync` for what is not committed; and
the same two from the guest for the way back. The guest has an image of its own with git and rsync.
Removing what a run has made is outside the clock.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.ground import Ground
from tests.bench.import_tree import make_repository
from tests.bench.measure import Figure, load, timed

_FILES = 50_000
_FILE_BYTES = 10_000
_CHANGED = 10
_MOST_RUNS = 3  # each takes minutes
_VM = "big"
_SIZE = ("--disk-size", "4G", "--memory", "1G")
_OURS, _THEIRS = "/root/repo", "/root/clone"
_DIRECTORIES = _FILES // 50


def large_repository(ground: Ground, runs: int) -> list[Figure]:
    """First prepare against clone and rsync; `--auto-prepare` against the first; export against
    clone and rsync."""
    runs = min(runs, _MOST_RUNS)
    ground.create(_VM, "--image", ground.furnish_with_git(), *_SIZE)
    try:
        with _repository(ground) as (root, port):
            return _Bench(ground, root, port).measure(runs)
    finally:
        ground.ok("vm", "delete", _VM)


@contextlib.contextmanager
def _repository(ground: Ground) -> Iterator[tuple[Path, int]]:
    """The repository, and the port of a git daemon that serves it on loopback."""
    root = ground.root / "large"
    root.mkdir()
    make_repository(root, files=_FILES, file_bytes=_FILE_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon = subprocess.Popen(
        ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--port={port}",
         "--reuseaddr", f"--base-path={ground.root}", str(ground.root)],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        yield root, port
    finally:
        daemon.terminate()
        daemon.wait()


class _Bench:
    def __init__(self, ground: Ground, root: Path, port: int) -> None:
        self.ground, self.root, self.port = ground, root, port
        self.ssh = ground.ssh(_VM)
        self.turn = 0

    def measure(self, runs: int) -> list[Figure]:
        before = load()
        first: list[float] = []
        again: list[float] = []
        theirs: list[float] = []
        for number in range(runs):
            sides = [(self.prepare, first), (self.clone, theirs)]
            for side, series in sides if number % 2 == 0 else sides[::-1]:
                self._in_guest(f"rm -rf {_OURS} {_THEIRS}; sync")
                series.append(side())
                if side == self.prepare:
                    self.touch()
                    again.append(self.prepare_again())
        self._in_guest(f"rm -rf {_THEIRS}; sync")
        self.prepare_again()
        export_load = load()
        self._in_guest(
            f"cd {_OURS}; for d in module00*; do echo x >> $d/$(ls $d | head -n 1); done"
        )
        exported: list[float] = []
        fetched: list[float] = []
        for number in range(runs):
            sides = [(self.export, exported), (self.fetch, fetched)]
            for side, series in sides if number % 2 == 0 else sides[::-1]:
                series.append(side())
        size = _FILES * _FILE_BYTES
        return [
            Figure(
                key="large_import", title="first prepare of 50,000 files, 500 MB",
                against="git clone over ssh, then rsync", unit="s", aim=0.6, ours=first,
                theirs=theirs, load=before, parts=_speeds(min(first), size),
            ),
            Figure(
                key="large_again", title="exec --auto-prepare, 10 of 50,000 files changed",
                against="the first prepare", unit="s", aim=0.05, ours=again, theirs=first,
                load=before,
            ),
            Figure(
                key="large_export", title="export of 10 of 50,000 files",
                against="git clone over ssh, then rsync", unit="s", aim=0.6, ours=exported,
                theirs=fetched, load=export_load, parts=_speeds(min(exported), size),
            ),
        ]  # fmt: skip

    def _in_guest(self, script: str) -> None:
        self.ground.ok(
            "vm", "exec", "--guest-path", "/", _VM, "--", "sh", "-c", script, timeout_s=600
        )

    def touch(self) -> None:
        self.turn += 1
        for number in range(_CHANGED):
            module = number * (_DIRECTORIES // _CHANGED)
            file = self.root / f"module{module:03}" / f"file{module * 50:05}.c"
            file.write_text(f"changed {self.turn}\n{file.read_text()[:5000]}")

    def prepare(self) -> float:
        return self.ground.time("vm", "workspace", "prepare", "-q", _VM, str(self.root))

    def prepare_again(self) -> float:
        return self.ground.time("vm", "exec", "--auto-prepare", _VM, "--", "true")

    def clone(self) -> float:
        url = f"git://127.0.0.1:{self.port}/{self.root.name}"
        back = f"{self.port}:127.0.0.1:{self.port}"
        line = f"git clone -q {url} {_THEIRS}"
        return timed([*self.ssh[:-1], "-R", back, self.ssh[-1], line]) + self._rsync(
            f"{self.root}/", f"{self.ssh[-1]}:{_THEIRS}/"
        )

    def _rsync(self, source: str, target: str) -> float:
        rsh = shlex.join(self.ssh[:-1])
        return timed(["rsync", "-a", "--delete", "--exclude=.git", "-e", rsh, source, target])

    def export(self) -> float:
        patch = str(self.ground.root / "large.patch")
        return self.ground.time("vm", "workspace", "export", "-q", _VM, "-o", patch)

    def fetch(self) -> float:
        """The guest's repository cloned here, then its files as they are."""
        target = self.ground.root / "fetched"
        words = ["git", "-c", f"core.sshCommand={shlex.join(self.ssh[:-1])}", "clone", "-q"]
        took = timed([*words, f"{self.ssh[-1]}:{_OURS}", str(target)])
        took += self._rsync(f"{self.ssh[-1]}:{_OURS}/", f"{target}/")
        subprocess.run(["rm", "-rf", str(target)], check=True)
        return took


def _speeds(best_s: float, size: int) -> dict[str, float]:
    return {"files_per_s": _FILES / best_s, "mb_per_s": size / 1e6 / best_s}
