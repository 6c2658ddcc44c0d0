"""A helper served on a socket for an owner that is nobody else, and what the owner does to it.

Everything lies in one directory of root's own outside /tmp, because the helper trusts no place that
others can change; it goes with the fixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from banger_root import cgroup, jail, paths, trust, validate
from banger_root.ledger import Ledger
from host.namespace import census
from patience import PATIENCE_S

OWNER = 12345
SOURCE = Path(__file__).resolve().parents[2] / "src/banger_root"
ISOLATED = ("/usr/bin/python3", "-I", "-S", "-B")
ROLES = ("image", "overlay", "work", "modules")


class Peer:
    """A connection to the helper."""

    def __init__(self, path: Path, *, uid: int) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(PATIENCE_S)
        try:
            with paths.as_owner(uid):
                self.connection.connect(str(path))
        except BaseException:
            self.connection.close()
            raise
        self._file = self.connection.makefile("rb")

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self) -> Any:
        """The next answer, None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def call(self, method: str, **params: Any) -> Any:
        request = {"version": 1, "method": method, "params": params, "op_id": "op-00beef"}
        self.send(json.dumps(request).encode() + b"\n")
        return self.answer()

    def close(self) -> None:
        self._file.close()
        self.connection.close()


class Served:
    """A running helper with the directories that it was started for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.runtime = root / "run"
        self.socket = root / "socket" / "helper.sock"
        self.ledger = root / "leases"
        self.base = root / "root" / "jail"
        self.programs = root / "root" / "bin"
        self.log = root / "helper.log"
        self.archive = root / "program" / "banger-root.pyz"
        self.process: subprocess.Popen[bytes] | None = None
        for directory in (root, root / "root", root / "program"):
            directory.mkdir(mode=0o755)
            directory.chmod(0o755)
        for directory in (self.state, self.state / "vms", self.runtime):
            self.own(directory)
        build_archive(self.archive)

    def own(self, path: Path, content: bytes | None = None) -> Path:
        """Make a directory, or a file with some content, as the owner's."""
        if content is None:
            path.mkdir(mode=0o700)
        else:
            path.write_bytes(content)
        os.chown(path, OWNER, OWNER, follow_symlinks=False)
        return path

    @property
    def mark(self) -> str:
        """What the helper writes on the objects of its ledger."""
        ledger = Ledger(str(self.ledger))
        try:
            return ledger.mark
        finally:
            ledger.close()

    @property
    def argv(self) -> list[str]:
        return [
            *ISOLATED, str(self.archive), "--serve",
            "--owner-uid", str(OWNER),
            "--socket", str(self.socket),
            "--ledger", str(self.ledger),
            "--jail-base", str(self.base),
            "--bin-dir", str(self.programs),
            "--state-root", str(self.state),
            "--runtime-root", str(self.runtime),
        ]  # fmt: skip

    def start(self, *, preexec: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
        """Start the helper and wait until it says that it is ready."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            place = self.root / f"notify-{secrets.token_hex(4)}"
            told.bind(str(place))
            told.settimeout(PATIENCE_S)
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.argv,
                    stderr=log,
                    env={"NOTIFY_SOCKET": str(place)},
                    preexec_fn=preexec,
                )
            assert told.recv(100) == b"READY=1"
            place.unlink()
        return self.process

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=PATIENCE_S)
        self.process = None
        return status

    @contextmanager
    def peer(self, *, uid: int = OWNER) -> Iterator[Peer]:
        peer = Peer(self.socket, uid=uid)
        try:
            yield peer
        finally:
            peer.close()

    def call(self, method: str, **params: Any) -> Any:
        """One call of the owner's, on a connection of its own."""
        with self.peer() as peer:
            return peer.call(method, **params)

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def root_of(self, vm_id: str) -> Path:
        return Path(jail.jail_root(str(self.base), vm_id))

    def files(self, vm_id: str) -> dict[str, Any]:
        """The owner's files of a VM; the params of its launch."""
        directory = self.own(self.state / "vms" / vm_id)
        made = {
            name: str(self.own(directory / name, name.encode() * 1000))
            for name in ("kernel", "initrd", *ROLES)
        }
        console = self.own(directory / "console.log", b"")
        console.chmod(0o600)
        return {
            "id": vm_id,
            "firecracker_bin": str(find_program("firecracker")),
            "jailer_bin": str(find_program("jailer")),
            "kernel": made["kernel"],
            "initrd": made["initrd"],
            "drives": [{"role": role, "path": made[role]} for role in ROLES],
            "console": str(console),
        }


@contextmanager
def serving() -> Iterator[Served]:
    """A served helper in a directory of its own; what it leased is given back at the end."""
    root = Path("/var/lib") / f"banger-test-{secrets.token_hex(4)}"
    served = Served(root)
    try:
        served.start()
        yield served
    finally:
        if served.process is not None:
            for path in served.ledger.glob("*.json"):
                with suppress(OSError):
                    served.call("release", id=path.stem)
            served.stop()
        shutil.rmtree(root, ignore_errors=True)


def build_archive(path: Path) -> None:
    """The helper as one zip, as it is installed."""
    with zipfile.ZipFile(path, "w") as z:
        z.write(SOURCE / "__main__.py", "__main__.py")
        for module in SOURCE.glob("*.py"):
            z.write(module, f"banger_root/{module.name}")
    path.chmod(0o644)


def find_program(name: str) -> Path:
    """A pinned program, as `make firecracker` puts it."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    path = Path(state) / "banger/bin" / name
    if not path.exists():
        pytest.skip(f"needs {name} (make firecracker)")
    return path


def has_pinned_programs() -> bool:
    """Whether the programs that the helper trusts by content are here."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return all(
        (path := Path(state) / "banger/bin" / name).exists()
        and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        for name, digest in trust.PINS.items()
    )


def world(served: Served) -> dict[str, Any]:
    """All that a call could have changed, but the ledger's and the log's own files."""
    skipped = {served.ledger, served.log}
    jails = served.base / "firecracker"
    tree = {}
    for directory, names, files in os.walk(served.root):
        here = Path(directory)
        names[:] = [name for name in names if here / name not in skipped]
        for name in [*names, *files]:
            if (path := here / name) not in skipped:
                st = path.lstat()
                # A jail is made anew for every launch.
                inode = 0 if path.is_relative_to(jails) else st.st_ino
                tree[str(path)] = (st.st_mode, st.st_uid, st.st_gid, st.st_nlink, inode)
    leases = sorted(p.name for p in served.ledger.iterdir())
    return {
        **census(),
        "tree": tree,
        "mounts": sorted(
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if str(served.root) in line
        ),
        # Those of this ledger alone: other tests may run. A lease may have one.
        "cgroups": sorted(
            path
            for path in cgroup.find_marked(served.mark)
            if f"{Path(path).name}.json" not in leases
        ),
        "leases": leases,
    }


def is_gone(pid: int, start_time: int) -> bool:
    """Whether this very process has ended; a zombie that nobody reaps has."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = text.rpartition(")")[2].split()
    return fields[0] in "ZX" or int(fields[19]) != start_time


def wait_gone(pid: int, start_time: int) -> None:
    """Wait for the end of a process that may be nobody's child."""
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_gone(pid, start_time):
            return
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000), f"pid {pid} is still there"
    finally:
        os.close(fd)


def as_child(uid: int, do: Callable[[], object]) -> str:
    """Do something in a process that is this user for good; the name of the error, or `done`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        word = "done"
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            do()
        except BaseException as e:
            word = type(e).__name__
        finally:
            os.write(writing, word.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as f:
        word = f.read()
    os.waitpid(pid, 0)
    return word


def spare_id() -> str:
    """The id of a VM that no other test has."""
    return validate.parse_lease_id(secrets.token_hex(16))
