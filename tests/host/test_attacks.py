"""A daemon of the owner's that has been taken over, against the helper that is served to it.

Whatever it sends, plants or swaps: it is refused with a reason and a log line, and nothing outside
the ledger changes. Every test ends with a census of links, addresses, routes, rules, cgroups,
mounts and of every file around the helper.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from banger_root import validate
from banger_root.ledger import Entry, Ledger
from host.conftest import build_params
from host.namespace import ip, own_namespace, run
from host.served import (
    OWNER,
    ROLES,
    Served,
    as_child,
    has_pinned_programs,
    is_gone,
    serving,
    wait_gone,
    world,
)
from patience import PATIENCE_S

pytestmark = pytest.mark.host

WRITABLE = ("initrd", "overlay", "work", "console")
READABLE = ("kernel", "image", "modules")


@pytest.fixture(scope="module")
def served(obstacle: str | None) -> Iterator[Served]:
    if obstacle:
        pytest.skip(obstacle)
    if not has_pinned_programs():
        pytest.skip("needs the pinned firecracker and jailer (make firecracker)")
    with own_namespace(), serving() as served:
        # So that its making is no change: the first launch copies the programs.
        params = {**build_params(200), "jail": True}
        served.call("prepare", **params)
        assert "result" in served.call("launch", **served.files(params["vm_id"]))
        served.call("release", id=params["vm_id"])
        yield served


@pytest.fixture
def lease(served: Served) -> Iterator[dict[str, Any]]:
    """The launch params of a prepared lease; at the end it is released."""
    params = {**build_params(2), "jail": True}
    assert "result" in served.call("prepare", **params)
    yield served.files(params["vm_id"])
    assert served.call("release", id=params["vm_id"]) == {"result": {}}


@pytest.fixture
def victim(served: Served) -> Iterator[Path]:
    """A file that is root's alone, on the same filesystem as everything of the owner's."""
    path = served.root / "shadow"
    path.write_text("root:secret")
    path.chmod(0o600)
    yield path
    assert path.read_text() == "root:secret"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)
    path.unlink()


@contextmanager
def unchanged(served: Served) -> Iterator[None]:
    before = world(served)
    yield
    assert world(served) == before


def refused(served: Served, method: str, params: Any, *codes: str) -> str:
    """The call is refused, for a reason that is in the log as well; the message."""
    size = len(served.lines())
    error = served.call(method, **params)["error"]
    assert error["code"] in codes, error
    assert error["message"]
    assert error["op_id"] == "op-00beef"
    line = served.lines()[size]
    assert (line["result"], line["message"]) == (error["code"], error["message"])
    message = error["message"]
    assert isinstance(message, str)
    return message


def with_path(lease: dict[str, Any], name: str, path: object) -> dict[str, Any]:
    """Launch params with another path for a file."""
    changed = copy.deepcopy(lease)
    if name in ROLES:
        changed["drives"][ROLES.index(name)]["path"] = path
    else:
        changed[name] = path
    return changed


def path_of(lease: dict[str, Any], name: str) -> Path:
    if name in ROLES:
        return Path(lease["drives"][ROLES.index(name)]["path"])
    return Path(lease[name])


def test_path_with_detours_is_refused_before_it_is_looked_at(
    served: Served, lease: dict[str, Any]
) -> None:
    with unchanged(served), served.peer() as peer:
        for name in (*WRITABLE, *READABLE, "firecracker_bin", "jailer_bin"):
            path = str(path_of(lease, name))
            directory, _, last = path.rpartition("/")
            for shape in (
                f"{directory}/../{directory.rpartition('/')[2]}/{last}",
                f"{directory}/./{last}",
                f"{directory}//{last}",
                f"{path}/",
                f"{path}/..",
                path.lstrip("/"),
                "",
                "/",
                f"{path}\0",
                f"{path}\n",
                f"{directory}/\ud800{last}",
                "/" + "a" * 1024,
                "~/disk",
                7,
                None,
                ["/", path],
            ):
                error = peer.call("launch", **with_path(lease, name, shape))["error"]
                assert error["code"] == "bad_request"
                assert "must be an absolute path" in error["message"]
                assert served.lines()[-1]["message"] == error["message"]


def test_writable_file_outside_the_owners_roots_is_refused(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    twin = served.own(served.root / "state-not", b"the owner's, beside the root")
    with unchanged(served):
        for name in WRITABLE:
            for path in (victim, twin, served.state, Path("/etc/passwd"), served.ledger / "x"):
                message = refused(
                    served, "launch", with_path(lease, name, str(path)), "unauthorized"
                )
                assert "does not lie beneath" in message
    twin.unlink()


def test_link_in_any_component_of_the_owners_is_refused(
    served: Served, lease: dict[str, Any]
) -> None:
    """Even one that leads to where the real thing lies."""
    with unchanged(served):
        for name in (*WRITABLE, *READABLE):
            path = path_of(lease, name)
            for component in (path, path.parent, path.parent.parent, served.state):
                real = component.with_name(f"{component.name}-real")
                component.rename(real)
                component.symlink_to(real)
                try:
                    assert "symbolic link" in refused(served, "launch", lease, "bad_request")
                finally:
                    component.unlink()
                    real.rename(component)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """The real thing is put aside, and comes back."""
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    try:
        yield
    finally:
        path.unlink()
        aside.rename(path)


def test_link_to_what_only_root_may_read_is_refused(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    with unchanged(served):
        for name in (*WRITABLE, *READABLE):
            path = path_of(lease, name)
            with replaced(path):
                path.symlink_to(victim)
                assert "symbolic link" in refused(served, "launch", lease, "bad_request")


def test_hard_link_to_what_only_root_may_read_is_refused(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    """Where the kernel does not protect hard links, an owner can make this one."""
    with unchanged(served):
        for name in (*WRITABLE, *READABLE):
            path = path_of(lease, name)
            with replaced(path):
                path.hardlink_to(victim)
                refused(served, "launch", lease, "unauthorized")


def test_own_file_that_has_a_second_name_is_refused_for_writing(
    served: Served, lease: dict[str, Any]
) -> None:
    with unchanged(served):
        for name in WRITABLE:
            path = path_of(lease, name)
            second = path.with_name("second")
            second.hardlink_to(path)
            assert "hard links" in refused(served, "launch", lease, "unauthorized")
            second.unlink()


def test_file_that_only_root_may_read_is_not_put_into_a_jail(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    with unchanged(served):
        for name in READABLE:
            for path in (victim, Path(f"/proc/{os.getpid()}/environ")):
                message = refused(
                    served, "launch", with_path(lease, name, str(path)), "unauthorized"
                )
                assert f"uid {OWNER} may not read" in message


@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "character device"])
def test_console_that_is_no_file_is_refused_without_a_wait(
    served: Served, lease: dict[str, Any], kind: str
) -> None:
    path = Path(lease["console"])
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            fd = os.open(path.parent, os.O_PATH)
            s.bind(f"/proc/self/fd/{fd}/{path.name}")
            os.close(fd)
    else:
        os.mknod(path, 0o20666, os.makedev(1, 5))
    os.chown(path, OWNER, OWNER)
    with unchanged(served):
        assert f"is a {kind}, no file" in refused(served, "launch", lease, "bad_request")


@pytest.mark.parametrize("name", ["firecracker_bin", "jailer_bin"])
def test_program_of_the_owners_choice_is_not_run(
    served: Served, lease: dict[str, Any], name: str
) -> None:
    plain = name.removesuffix("_bin")
    script = served.own(served.state / plain, f"#!/bin/sh\ntouch {served.root}/owned\n".encode())
    script.chmod(0o755)
    with unchanged(served):
        message = refused(served, "launch", with_path(lease, name, str(script)), "unauthorized")
        assert "is not the pinned one" in message
        for path in ("/bin/sh", "/usr/bin/python3", "/bin/mount"):
            assert "called" in refused(
                served, "launch", with_path(lease, name, path), "unauthorized"
            )
    assert not (served.root / "owned").exists()
    script.unlink()


FOREIGN_BRIDGES = (
    "eth0", "lo", "docker0", "virbr0", "br-fcx", "br-", "br-fc-", "br-fc-ABC", "br-fc-a/b",
    "br-fc-..", "br-fc-a\n", "br-fc-a b", "br-fc-0123456789", "br-fc\0", "", "%d", 5, None,
)  # fmt: skip


def test_interface_of_somebody_elses_is_neither_used_nor_named(served: Served) -> None:
    run("ip link add eth7 type veth peer name eth8")
    run("ip link add br-fc-foe type bridge")
    try:
        with unchanged(served):
            for name in ("eth7", *FOREIGN_BRIDGES):
                params = build_params(2, name=name)
                refused(served, "prepare", params, "bad_request")
                params = {"action": "set", "link": name, "server": "127.0.0.1", "domains": ["~vm"]}
                refused(served, "resolver", params, "bad_request")
            params = build_params(2, name="br-fc-foe")
            assert "is not this bridge" in refused(served, "prepare", params, "already_exists")
            for field in ("tap", "interface", "dev", "cgroup", "pid"):
                params = {**build_params(2), field: "eth7"}
                refused(served, "prepare", params, "bad_request")
        (bridge,) = ip("link show br-fc-foe")
        assert "master" not in ip("link show eth7")[0]
        assert bridge["ifname"] == "br-fc-foe"
    finally:
        run("ip link delete eth7")
        run("ip link delete br-fc-foe")


def test_tap_that_somebody_else_has_made_is_not_taken_over(served: Served) -> None:
    params = build_params(2)
    run(f"ip tuntap add tap-fc-{params['vm_id'][:8]} mode tap")
    try:
        with unchanged(served):
            refused(served, "prepare", params, "already_exists")
            assert served.call("release", id=params["vm_id"]) == {"result": {}}
    finally:
        run(f"ip link delete tap-fc-{params['vm_id'][:8]}")


def test_address_that_is_not_of_the_private_bridge_is_refused(served: Served) -> None:
    with unchanged(served):
        for address, prefix in (
            ("8.8.8.1", 24), ("127.0.0.1", 24), ("169.254.0.1", 24), ("224.0.0.1", 24),
            ("172.31.0.1", 7), ("172.31.0.1", 31), ("172.31.0.0", 24), ("::1", 24),
            ("172.31.0.1", True), ("172.031.0.1", 24), (2887712769, 24),
        ):  # fmt: skip
            params = build_params(2)
            params["bridge"] |= {"address": address, "prefix": prefix}
            refused(served, "prepare", params, "bad_request")
        for guest in ("172.31.0.1", "172.31.0.0", "172.31.0.255", "172.31.1.2", "10.0.0.1"):
            params = build_params(2)
            params["guest"] = {"address": guest, "mac": validate.mac_of(IPv4Address(guest))}
            refused(served, "prepare", params, "bad_request")
        params = build_params(2)
        params["guest"]["mac"] = "06:00:ac:1f:00:01"
        refused(served, "prepare", params, "bad_request")


def test_no_call_takes_a_pid(served: Served, lease: dict[str, Any]) -> None:
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        try:
            with unchanged(served):
                for method, params in (
                    ("signal", {"id": lease["id"], "name": "KILL", "pid": bystander.pid}),
                    ("signal", {"pid": bystander.pid, "name": "KILL"}),
                    ("signal", {"id": str(bystander.pid), "name": "KILL"}),
                    ("signal", {"id": bystander.pid, "name": "KILL"}),
                    ("release", {"id": lease["id"], "pid": bystander.pid}),
                    ("launch", {**lease, "pid": bystander.pid}),
                ):
                    refused(served, method, params, "bad_request")
                # A lease that has launched nothing has nobody to signal.
                params = {"id": lease["id"], "name": "KILL"}
                refused(served, "signal", params, "not_running")
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_process_that_got_the_pid_of_a_dead_vmm_is_left_alone(
    served: Served, lease: dict[str, Any]
) -> None:
    """The ledger as it would be when the kernel gave the pid to somebody else since."""
    ledger = Ledger(str(served.ledger))
    entry = ledger.find(lease["id"])
    assert entry is not None
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        try:
            ledger.save(replace(entry, pid=bystander.pid, start_time=1))
            with unchanged(served):
                params = {"id": lease["id"], "name": "KILL"}
                refused(served, "signal", params, "not_running")
            assert served.call("release", id=lease["id"]) == {"result": {}}
            assert bystander.poll() is None
        finally:
            bystander.kill()
            ledger.close()


SIGNALS = (
    "STOP", "CONT", "SIGSTOP", "SIGCONT", "TSTP", "CHLD", "SEGV", "RTMIN", "9", "KILL ", " KILL",
    "KILL\n", "SIGSIGKILL", "SIG", "", "K\u0131LL", "\u017fIGKILL", 9, 19, 9.0, True,
    None, ["KILL"],
)  # fmt: skip


def test_signal_outside_the_list_is_not_sent(served: Served, lease: dict[str, Any]) -> None:
    result = served.call("launch", **lease)["result"]
    with unchanged(served):
        for name in SIGNALS:
            refused(served, "signal", {"id": lease["id"], "name": name}, "bad_request")
    state = Path(f"/proc/{result['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    assert state in "SR"


def test_released_lease_cannot_be_used_again(served: Served) -> None:
    params = {**build_params(2), "jail": True}
    with unchanged(served):
        served.call("prepare", **params)
        directory = served.files(params["vm_id"])
        process = served.call("launch", **directory)["result"]
        assert served.call("release", id=params["vm_id"]) == {"result": {}}
        assert is_gone(process["pid"], process["start_time"])
        for path in sorted(Path(directory["kernel"]).parent.iterdir()):
            path.unlink()
        Path(directory["kernel"]).parent.rmdir()
        refused(served, "launch", directory, "not_found")
        refused(served, "signal", {"id": params["vm_id"], "name": "KILL"}, "not_found")
        assert served.call("release", id=params["vm_id"]) == {"result": {}}
        assert served.call("sweep", pool=None)["result"]["removed"] == []


def test_lease_of_somebody_else_is_out_of_reach(served: Served) -> None:
    params = {**build_params(9), "jail": True}
    ledger = Ledger(str(served.ledger))
    plan = validate.parse_prepare(params)
    foreign = Entry(
        plan=plan, tap=plan.own_tap, owner_uid=OWNER + 1, state="ready", held=(), created_at=1.0
    )
    ledger.save(foreign)
    directory = served.files(params["vm_id"])
    with unchanged(served):
        refused(served, "prepare", params, "unauthorized")
        refused(served, "launch", directory, "unauthorized")
        refused(served, "signal", {"id": params["vm_id"], "name": "KILL"}, "unauthorized")
        refused(served, "release", {"id": params["vm_id"]}, "unauthorized")
        # Nor does its address become free by that.
        refused(served, "prepare", build_params(9), "already_exists")
    ledger.remove(params["vm_id"])
    ledger.close()


@pytest.mark.parametrize(
    "vm_id", ["../../../../etc", "A" * 32, "a" * 31, "a" * 33, "a" * 31 + "\n", "", 7, None, ["a"]]
)
def test_id_that_is_none_is_refused_by_every_method(served: Served, vm_id: object) -> None:
    with unchanged(served):
        refused(served, "prepare", {**build_params(2), "vm_id": vm_id}, "bad_request")
        refused(served, "release", {"id": vm_id}, "bad_request")
        refused(served, "signal", {"id": vm_id, "name": "KILL"}, "bad_request")


def test_request_that_is_too_long_is_refused_and_the_next_is_served(served: Served) -> None:
    with unchanged(served), served.peer() as peer:
        # It answers after the first byte too many, and may have closed before the last one.
        size = len(served.lines())
        try:
            peer.send(b'{"version":1,"method":"' + b"a" * (4 << 20))
        except (BrokenPipeError, ConnectionResetError):
            pass
        wait_for_line(served, size)
        assert served.lines()[size]["result"] == "bad_request"
        assert "result" in served.call("status")


def test_request_without_an_end_is_logged_and_does_nothing(served: Served) -> None:
    size = len(served.lines())
    with unchanged(served):
        with served.peer() as peer:
            request = {"version": 1, "method": "prepare", "params": build_params(2)}
            peer.send(json.dumps(request).encode())
        wait_for_line(served, size)
    assert served.lines()[size]["message"] == "a request has no end"


def wait_for_line(served: Served, size: int) -> None:
    """Wait for one more line in the log; the test's own deadline ends it."""
    while len(served.lines()) <= size:
        time.sleep(0.005)


MALFORMED = (
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"version":1}', b'{"version":2,"method":"status"}',
    b'{"version":1,"method":"exec","params":{}}', b'{"version":1,"method":"status","params":[]}',
    b'{"version":1,"method":"status","params":{"a":1}}', b'{"version":1,"version":1}',
    b'{"version":true,"method":"status","params":{}}', b'{"version":1,"method":["status"]}',
    b"[" * 100_000, b'{"a":' * 20 + b"1" + b"}" * 20, b'{"version":1e999}', b'{"version":NaN}',
    b'{"version":1,"method":"status","params":{},"op_id":"a b"}', b"1" * 10_000,
)  # fmt: skip


def test_line_that_is_no_request_is_refused_on_its_own(served: Served) -> None:
    size = len(served.lines())
    with unchanged(served), served.peer() as peer:
        for line in MALFORMED:
            peer.send(line + b"\n")
            assert peer.answer()["error"]["code"] in (
                "bad_request",
                "bad_version",
                "unknown_method",
            )
        assert "result" in peer.call("status")
    assert len(served.lines()) == size + len(MALFORMED) + 1


def test_more_leases_than_there_may_be_are_refused(served: Served) -> None:
    ledger = Ledger(str(served.ledger))
    entries = []
    for number in range(250):
        params = build_params(2, address=f"10.{number}.0.1")
        plan = validate.parse_prepare(params)
        entries.append(
            Entry(
                plan=plan,
                tap=plan.own_tap,
                owner_uid=OWNER,
                state="ready",
                held=(),
                created_at=time.time(),
            )
        )
        ledger.save(entries[-1])
    try:
        with unchanged(served), served.peer() as peer:
            for _ in range(10):
                answer = peer.call("prepare", **build_params(3))
                assert "there are 250 leases" in answer["error"]["message"]
    finally:
        for entry in entries:
            ledger.remove(entry.id)
        ledger.close()


def all_at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call returns, when all begin at the same time."""
    start = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def go(number: int) -> None:
        start.wait(PATIENCE_S)
        results[number] = calls[number]()

    threads = [threading.Thread(target=go, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_address_is_leased_once_to_those_that_ask_at_the_same_time(served: Served) -> None:
    with unchanged(served):
        wanted = [build_params(2) for _ in range(6)]
        peers = [served.peer() for _ in wanted]
        # Connected one after the other: connecting changes this process's own rights.
        open_peers = [peer.__enter__() for peer in peers]
        answers = all_at_once(
            [
                lambda p=peer, params=params: p.call("prepare", **params)  # type: ignore[misc]
                for peer, params in zip(open_peers, wanted, strict=True)
            ]
        )
        for peer in peers:
            peer.__exit__(None, None, None)
        won = [a["result"]["id"] for a in answers if "result" in a]
        assert len(won) == 1
        assert {a["error"]["reason"] for a in answers if "error" in a} == {"in_use"}
        assert served.call("release", id=won[0]) == {"result": {}}


def test_one_lease_launched_at_the_same_time_by_several_runs_once(
    served: Served, lease: dict[str, Any]
) -> None:
    peers = [served.peer() for _ in range(4)]
    open_peers = [peer.__enter__() for peer in peers]
    answers = all_at_once(
        [lambda p=peer: p.call("launch", **lease) for peer in open_peers]  # type: ignore[misc]
    )
    for peer in peers:
        peer.__exit__(None, None, None)
    ran = [a["result"] for a in answers if "result" in a]
    assert len(ran) == 1
    assert {a["error"]["reason"] for a in answers if "error" in a} == {"in_use"}
    assert not is_gone(ran[0]["pid"], ran[0]["start_time"])


def test_jail_cannot_be_reached_before_its_vmm_runs(served: Served, lease: dict[str, Any]) -> None:
    """The jailer works in it as root, and would follow what it finds."""
    root = served.root_of(lease["id"])
    plants: list[Callable[[], object]] = [
        lambda: (root / "dev").symlink_to("/etc"),
        lambda: (root / "firecracker").symlink_to("/etc/shadow"),
        lambda: (root.parent / "root2").mkdir(),
        lambda: root.rename(root.with_name("other")),
        lambda: os.listdir(root),
        lambda: os.open(root, os.O_PATH | os.O_DIRECTORY) and os.chdir(root),
    ]
    with unchanged(served):
        for plant in plants:
            assert as_child(OWNER, plant) == "PermissionError"
    result = served.call("launch", **lease)["result"]
    served.call("signal", id=lease["id"], name="KILL")
    wait_gone(result["pid"], result["start_time"])


def test_what_was_planted_in_a_used_jail_is_gone_at_the_next_launch(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    result = served.call("launch", **lease)["result"]
    root = served.root_of(lease["id"])
    held = os.open(root, os.O_PATH | os.O_DIRECTORY)

    def plant() -> None:
        for name in ("api.sock", "dev/kvm"):
            (root / name).unlink()
            (root / name).symlink_to(victim)
        (root / "run").rename(root / "run2")
        (root / "run").symlink_to("/")

    assert as_child(OWNER, plant) == "done"
    served.call("signal", id=lease["id"], name="KILL")
    wait_gone(result["pid"], result["start_time"])
    before = victim.parent.stat().st_nlink
    assert "result" in served.call("launch", **lease)
    assert not (root / "run2").exists()
    assert not (root / "api.sock").is_symlink()
    # A descriptor of the old one leads nowhere.
    assert os.listdir(f"/proc/self/fd/{held}") == []
    os.close(held)
    assert victim.parent.stat().st_nlink == before


def test_jail_full_of_traps_is_released_and_what_they_lead_to_stays(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    served.call("launch", **lease)
    root = served.root_of(lease["id"])

    def trap() -> None:
        os.chdir(root)
        os.symlink(victim.parent, "link")
        os.symlink("/", "root")
        os.mkfifo("fifo")
        os.mkdir("closed")
        os.symlink(victim, "closed/x")
        os.chmod("closed", 0)
        for _ in range(300):
            os.mkdir("d")
            os.chdir("d")

    assert as_child(OWNER, trap) == "done"
    before = world(served)
    assert served.call("release", id=lease["id"]) == {"result": {}}
    after = world(served)
    inside = f"{root.parent}"
    assert {
        p: s
        for p, s in before["tree"].items()
        if not p.startswith(inside) and p != str(root.parent.parent)
    } == {p: s for p, s in after["tree"].items() if p != str(root.parent.parent)}


def test_file_that_is_swapped_while_it_is_launched_is_never_another_one(
    served: Served, lease: dict[str, Any], victim: Path
) -> None:
    """Either the launch is refused, or the jail has the owner's own file."""
    overlay = path_of(lease, "overlay")
    image = path_of(lease, "image")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writing)
            os.set_blocking(reading, False)
            os.setgroups([])
            os.setgid(OWNER)
            os.setuid(OWNER)
            for path in (overlay, image):
                os.symlink(victim, f"{path}.link")
            while True:
                for path in (overlay, image):
                    os.rename(path, f"{path}.real")
                    os.rename(f"{path}.link", path)
                    os.rename(path, f"{path}.link")
                    os.rename(f"{path}.real", path)
                try:
                    if os.read(reading, 1) == b"":
                        break
                except BlockingIOError:
                    pass
        finally:
            os._exit(0)
    os.close(reading)
    launched = 0
    try:
        for _ in range(20):
            answer = served.call("launch", **lease)
            if "result" not in answer:
                assert answer["error"]["code"] in ("bad_request", "not_found"), answer
                continue
            launched += 1
            result = answer["result"]
            for name in ("overlay", "image"):
                assert Path(f"/proc/{result['pid']}/root/{name}").stat().st_uid == OWNER
            served.call("signal", id=lease["id"], name="KILL")
            wait_gone(result["pid"], result["start_time"])
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def test_drives_in_another_order_or_number_are_refused(
    served: Served, lease: dict[str, Any]
) -> None:
    drives = lease["drives"]
    with unchanged(served):
        for wrong in (
            drives[:3], [*drives, drives[0]], drives[::-1], [drives[0]] * 4, {}, None, [1, 2, 3, 4],
            [{**drive, "read_only": False} for drive in drives],
            [{"path": drive["path"]} for drive in drives],
            [{**drives[0], "role": "overlay"}, *drives[1:]],
        ):  # fmt: skip
            refused(served, "launch", {**lease, "drives": wrong}, "bad_request")
        for extra in ("uid", "gid", "argv", "env", "kernel_args", "jail_base", "cgroup"):
            refused(served, "launch", {**lease, extra: "0"}, "bad_request")


def test_helper_neither_grows_nor_leaks_over_all_of_this(served: Served) -> None:
    """Runs last in this module: descriptors and children of the listening process."""
    assert served.process is not None
    pid = served.process.pid
    served.call("status")
    descriptors = os.listdir(f"/proc/{pid}/fd")
    # Standard streams, the wake-up pipe, the socket and its directory.
    assert len(descriptors) <= 8
    # Its children end with their connections; the last one's end is awaited here.
    while Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        time.sleep(0.005)
    assert "result" in served.call("status")
