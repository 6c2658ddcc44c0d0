"""The helper as a service: its socket, its children, and what becomes of them when it ends."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger_root import process, service
from banger_root.errors import HelperError
from host.conftest import build_params
from host.namespace import own_namespace
from host.served import OWNER, Served, serving
from patience import PATIENCE_S

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def site(obstacle: str | None) -> Iterator[Served]:
    if obstacle:
        pytest.skip(obstacle)
    with own_namespace(), serving() as served:
        yield served


@pytest.fixture
def served(site: Served) -> Iterator[Served]:
    """A helper that runs; a test may have ended the one before."""
    if site.process is None or site.process.poll() is not None:
        site.start()
    yield site


def start_and_fail(served: Served) -> str:
    """Start a second helper; its last words."""
    done = subprocess.run(served.argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    message = json.loads(done.stderr.splitlines()[-1])["message"]
    assert isinstance(message, str)
    return message


def test_socket_is_the_owners_alone_in_a_directory_of_roots(served: Served) -> None:
    found = served.socket.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert (found.st_uid, found.st_mode & 0o7777) == (OWNER, 0o600)
    above = served.socket.parent.stat()
    assert (above.st_uid, above.st_mode & 0o7777) == (0, 0o711)
    assert served.call("status")["result"]["leases"] == []


def test_somebody_else_cannot_connect_and_is_refused_by_number(served: Served) -> None:
    with pytest.raises(PermissionError), served.peer(uid=OWNER + 1):
        pass
    served.socket.chmod(0o666)
    try:
        with served.peer(uid=OWNER + 1) as peer:
            assert peer.answer()["error"]["code"] == "unauthorized"
            assert peer.answer() is None
    finally:
        served.socket.chmod(0o600)
    assert served.lines()[-1]["message"] == f"uid {OWNER + 1} may not talk to this helper"


def test_root_may_connect(served: Served) -> None:
    with served.peer(uid=0) as peer:
        assert "result" in peer.call("status")


def test_second_helper_on_a_live_socket_is_refused(served: Served) -> None:
    assert "another helper listens" in start_and_fail(served)
    assert "result" in served.call("status")


def test_socket_of_a_killed_helper_is_replaced(served: Served) -> None:
    assert served.process is not None
    served.process.kill()
    served.process.wait()
    assert served.socket.exists()
    served.start()
    assert "result" in served.call("status")


def test_what_is_no_socket_is_not_replaced(served: Served) -> None:
    served.stop()
    served.socket.write_text("a file")
    assert "no socket" in start_and_fail(served)
    assert served.socket.read_text() == "a file"
    served.socket.unlink()


@pytest.mark.parametrize("kind", ["open to others", "closed to the owner", "symlink"])
def test_socket_directory_that_is_not_right_is_refused(served: Served, kind: str) -> None:
    served.stop()
    directory = served.socket.parent
    real = directory.with_name("elsewhere")
    if kind == "symlink":
        directory.rename(real)
        directory.symlink_to(real)
    else:
        directory.chmod(0o777 if kind == "open to others" else 0o700)
    try:
        assert str(directory) in start_and_fail(served)
    finally:
        if kind == "symlink":
            directory.unlink()
            real.rename(directory)
        directory.chmod(0o711)


def test_helper_from_a_file_that_others_can_write_does_not_serve(served: Served) -> None:
    served.stop()
    served.archive.chmod(0o666)
    try:
        assert "is not root's alone" in start_and_fail(served)
    finally:
        served.archive.chmod(0o644)


def test_helper_that_is_not_root_does_not_serve(served: Served) -> None:
    # Its ledger is not even looked at.
    done = subprocess.run(
        served.argv, capture_output=True, text=True, user=OWNER, group=OWNER, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert "as root only" in done.stderr


def test_long_socket_path_works(served: Served) -> None:
    """sun_path holds 108 bytes; the address is given by a descriptor."""
    directory = served.root / ("long" * 50)
    with service.listen(str(directory / "helper.sock"), owner_uid=OWNER) as listener:
        fd = os.open(directory, os.O_PATH)
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(f"/proc/self/fd/{fd}/helper.sock")
            listener.accept()[0].close()
        os.close(fd)
    (directory / "helper.sock").unlink()
    directory.rmdir()


def test_calls_on_other_connections_do_not_wait(served: Served) -> None:
    with served.peer() as slow:
        slow.send(b'{"version":1,"method":"sta')
        assert "result" in served.call("status")
        slow.send(b'tus","params":{}}\n')
        assert "result" in slow.answer()


def test_connection_beyond_the_limit_is_served_when_one_ends(served: Served) -> None:
    with served.peer() as first:
        others = [served.peer() for _ in range(service.CONNECTIONS_LIMIT - 1)]
        peers = [other.__enter__() for other in others]
        try:
            for peer in (first, *peers):
                assert "result" in peer.call("status")
            with served.peer() as late:
                late.send(b'{"version":1,"method":"status","params":{}}\n')
                first.close()
                assert "result" in late.answer()
        finally:
            for other in others:
                other.__exit__(None, None, None)


def test_child_that_is_killed_ends_one_call_only(served: Served) -> None:
    assert served.process is not None
    pid = served.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with served.peer() as peer:
        assert "result" in peer.call("status")
        # The child of an earlier test's connection may still be about to end.
        while len(found := children.read_text().split()) > 1:
            os.sched_yield()
        (child,) = found
        os.kill(int(child), signal.SIGKILL)
        assert peer.answer() is None
    assert "result" in served.call("status")
    # Its socket is closed before it has ended, and its end is noted a little later.
    while child in children.read_text().split():
        os.sched_yield()


def test_termination_lets_the_call_under_way_finish(served: Served) -> None:
    """The host's lock keeps a prepare waiting while the helper is told to end."""
    from banger_root.host_lock import host_lock

    assert served.process is not None
    params = build_params(2)
    with served.peer() as busy, served.peer() as idle:
        assert "result" in idle.call("status")
        assert "result" in busy.call("status")
        with host_lock():
            request = {"version": 1, "method": "prepare", "params": params}
            busy.send(json.dumps(request).encode() + b"\n")
            # Asked for under the lease's own lock: its file tells that the call has begun.
            wait_for(served.ledger / f".{params['vm_id']}.lock")
            served.process.send_signal(signal.SIGTERM)
            assert idle.answer() is None
            with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
                served.call("status")
        assert busy.answer()["result"]["id"] == params["vm_id"]
        assert busy.answer() is None
    assert served.process.wait(timeout=PATIENCE_S) == 0
    assert not served.socket.exists()
    served.start()
    (lease,) = served.call("status")["result"]["leases"]
    assert lease["state"] == "ready"
    assert served.call("release", id=params["vm_id"]) == {"result": {}}


def wait_for(path: Path) -> None:
    """Wait until a file is there; the test's own deadline ends it."""
    while not path.exists():
        os.sched_yield()


def test_service_manager_is_told_of_readiness_and_of_the_end(served: Served) -> None:
    served.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.settimeout(PATIENCE_S)
        # The name begins with a NUL byte: an abstract address, as systemd also gives them.
        told.bind(f"\0banger-test-{os.getpid()}")
        with served.log.open("ab") as log:
            process = subprocess.Popen(
                served.argv,
                stderr=log,
                env={"NOTIFY_SOCKET": f"@banger-test-{os.getpid()}"},
            )
        assert told.recv(100) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert told.recv(100) == b"STOPPING=1"
        assert process.wait(timeout=PATIENCE_S) == 0


def test_idle_connection_is_closed_after_a_while(
    obstacle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE_TIMEOUT_S", 0.05)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        theirs.settimeout(service.IDLE_TIMEOUT_S)

        def live() -> int:
            ours.close()
            return service._live(listener, theirs, lambda connection: connection.recv(1) and None)

        pid = process.fork(live)
        theirs.close()
        assert ours.recv(1) == b""
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_every_capability_beyond_the_units_list_is_unnecessary(served: Served) -> None:
    """Prepare, launch, signal and release with no more than the unit's bounding set."""
    served.stop()
    libc = ctypes.CDLL(None, use_errno=True)
    kept = read_unit_capabilities()

    def bound() -> None:
        for number in range(64):
            if number not in kept:
                # EINVAL beyond the last one that this kernel knows.
                libc.prctl(24, number, 0, 0, 0)

    process = served.start(preexec=bound)
    status = Path(f"/proc/{process.pid}/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff"))
    assert int(effective.split()[1], 16) == sum(1 << n for n in kept)
    params = {**build_params(2), "jail": True}
    assert "result" in served.call("prepare", **params)
    lease = served.files(params["vm_id"])
    assert "result" in served.call("launch", **lease)
    assert served.call("signal", id=params["vm_id"], name="TERM") == {"result": {}}
    assert served.call("release", id=params["vm_id"]) == {"result": {}}


# linux/capability.h
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
UNIT = Path(__file__).resolve().parents[2] / "src/banger/system/units/bangerd-root.service"


def read_unit_capabilities() -> set[int]:
    """The numbers of the unit's bounding set."""
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return {CAPABILITIES[name] for name in line.split()}


def test_two_that_start_at_once_do_not_both_listen(served: Served) -> None:
    served.stop()
    path = str(served.root / "race" / "helper.sock")
    Path(path).parent.mkdir(mode=0o711)
    Path(path).parent.chmod(0o711)
    results: list[str] = []
    done = threading.Barrier(2)

    def start() -> None:
        try:
            with service.listen(path, owner_uid=OWNER):
                results.append("listens")
                done.wait(PATIENCE_S)
        except HelperError as e:
            results.append(e.reason or "")
            done.wait(PATIENCE_S)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["in_use", "listens"]
