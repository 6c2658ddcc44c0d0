"""Launches through the served helper, with the real jailer and Firecracker up to its API."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger_root import paths
from host.conftest import build_params
from host.namespace import own_namespace
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


@pytest.fixture(scope="module")
def served(obstacle: str | None) -> Iterator[Served]:
    if obstacle:
        pytest.skip(obstacle)
    if not has_pinned_programs():
        pytest.skip("needs the pinned firecracker and jailer (make firecracker)")
    with own_namespace(), serving() as served:
        yield served


@pytest.fixture
def lease(served: Served) -> Iterator[dict[str, Any]]:
    """The launch params of a prepared lease."""
    params = {**build_params(2), "jail": True}
    assert served.call("prepare", **params)["result"]["jail"] == str(
        served.root_of(params["vm_id"])
    )
    yield served.files(params["vm_id"])
    assert served.call("release", id=params["vm_id"]) == {"result": {}}
    assert not served.root_of(params["vm_id"]).parent.exists()


def launch(served: Served, lease: dict[str, Any]) -> tuple[int, int]:
    result = served.call("launch", **lease)["result"]
    assert result.keys() == {"pid", "start_time", "boot_id"}
    return result["pid"], result["start_time"]


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_vmm_runs_as_the_owner_without_rights_or_environment(
    served: Served, lease: dict[str, Any]
) -> None:
    pid, _ = launch(served, lease)
    found = status(pid)
    assert found["Name"] == "firecracker"
    assert found["Uid"].split() == found["Gid"].split() == [str(OWNER)] * 4
    assert found["Groups"] == ""
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
    assert (found["NoNewPrivs"], found["Umask"]) == ("1", "0077")
    # Signals 32 to 34 are the C library's own: it lets nobody change what was inherited for them.
    assert int(found["SigIgn"], 16) & ~(0b111 << 31) == 0
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/firecracker\0")


def test_jail_holds_the_files_and_what_is_to_be_read_only_is(
    served: Served, lease: dict[str, Any]
) -> None:
    pid, _ = launch(served, lease)
    inside = Path(f"/proc/{pid}/root")
    given = {drive["role"]: drive["path"] for drive in lease["drives"]}
    given |= {"kernel": lease["kernel"], "initrd": lease["initrd"]}
    for name, path in given.items():
        assert (inside / name).samefile(path)
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    options = {fields[1]: set(fields[3].split(",")) for fields in mounts}
    assert options.keys() == {"/", *(f"/{name}" for name in given)}
    for name in given:
        assert {"nosuid", "nodev", "noexec"} <= options[f"/{name}"]
    read_only = {name for name in given if "ro" in options[f"/{name}"]}
    assert read_only == {"kernel", "initrd", "image", "modules"}


def test_binds_are_seen_by_the_vmm_alone_and_go_with_it(
    served: Served, lease: dict[str, Any]
) -> None:
    pid, start_time = launch(served, lease)
    assert str(served.root) not in Path("/proc/self/mounts").read_text()
    assert served.process is not None
    assert str(served.root) not in Path(f"/proc/{served.process.pid}/mounts").read_text()
    root = served.root_of(lease["id"])
    assert {(root / name).stat().st_size for name in ("kernel", "initrd", *ROLES)} == {0}
    assert served.call("signal", id=lease["id"], name="SIGKILL") == {"result": {}}
    wait_gone(pid, start_time)
    assert {(root / name).stat().st_size for name in ("kernel", "initrd", *ROLES)} == {0}


def test_api_socket_answers_the_owner(served: Served, lease: dict[str, Any]) -> None:
    launch(served, lease)
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(PATIENCE_S)
        with paths.as_owner(OWNER):
            s.connect(f"{served.root_of(lease['id'])}/api.sock")
        s.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert f'"id":"{lease["id"]}"'.encode() in s.recv(4096)


def test_owner_may_make_sockets_in_the_jail_and_others_may_not(
    served: Served, lease: dict[str, Any]
) -> None:
    launch(served, lease)
    plant = served.root_of(lease["id"]) / "vsock.sock_7001"
    assert as_child(OWNER + 1, plant.touch) == "PermissionError"
    assert as_child(OWNER, plant.touch) == "done"


def test_console_is_the_owners_file_and_can_only_be_added_to(
    served: Served, lease: dict[str, Any]
) -> None:
    Path(lease["console"]).write_text("earlier\n")
    os.chown(lease["console"], OWNER, OWNER)
    pid, _ = launch(served, lease)
    assert Path(lease["console"]).read_text().startswith("earlier\n")
    for number in ("1", "2"):
        assert Path(f"/proc/{pid}/fd/{number}").samefile(lease["console"])
        info = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
        flags = int(next(line for line in info if line.startswith("flags:")).split()[1], 8)
        assert flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND


def test_vmm_has_no_other_descriptors_of_the_helpers(served: Served, lease: dict[str, Any]) -> None:
    pid, _ = launch(served, lease)
    names = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    files = {name for name in names if name.startswith("/")}
    assert files == {lease["console"], "/null"}


def test_vmm_is_in_a_cgroup_of_its_own(served: Served, lease: dict[str, Any]) -> None:
    pid, _ = launch(served, lease)
    line = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1]
    if line == "0::/":
        pytest.skip("needs a writable cgroup v2")
    assert line.endswith((f"/banger/{lease['id']}", f"/banger-vm-{lease['id']}.scope"))


def test_second_launch_is_refused_while_the_first_runs_and_works_after_its_end(
    served: Served, lease: dict[str, Any]
) -> None:
    first = launch(served, lease)
    error = served.call("launch", **lease)["error"]
    assert (error["code"], error["reason"]) == ("already_exists", "in_use")
    assert not is_gone(*first)
    served.call("signal", id=lease["id"], name="kill")
    wait_gone(*first)
    assert served.call("signal", id=lease["id"], name="kill")["error"]["code"] == "not_running"
    assert launch(served, lease) != first


def test_release_ends_the_vmm(served: Served, lease: dict[str, Any]) -> None:
    process = launch(served, lease)
    assert served.call("release", id=lease["id"]) == {"result": {}}
    assert is_gone(*process)


def test_vmm_lives_on_when_the_helper_is_killed(served: Served, lease: dict[str, Any]) -> None:
    process = launch(served, lease)
    assert served.process is not None
    served.process.kill()
    served.process.wait()
    served.start()
    assert not is_gone(*process)
    (found,) = served.call("status")["result"]["leases"]
    assert (found["pid"], found["start_time"]) == process
    assert served.call("launch", **lease)["error"]["reason"] == "in_use"


def test_vmm_that_ends_at_once_is_reported_with_its_last_words(
    served: Served, lease: dict[str, Any]
) -> None:
    before = world(served)
    directory = served.root / "root" / "programs"
    directory.mkdir()
    directory.chmod(0o755)
    broken = directory / "firecracker"
    broken.write_text("#!/nowhere\n")
    broken.chmod(0o755)
    error = served.call("launch", **{**lease, "firecracker_bin": str(broken)})["error"]
    assert error["code"] == "operation_failed"
    assert "before its API socket accepted; its last words:" in error["message"]
    assert served.call("signal", id=lease["id"], name="TERM")["error"]["code"] == "not_running"
    broken.unlink()
    directory.rmdir()
    after = world(served)
    assert (before["links"], before["mounts"]) == (after["links"], after["mounts"])
    launch(served, lease)


@pytest.mark.parametrize("missing", ["kernel", "initrd", "image", "work"])
def test_missing_file_is_named_and_nothing_is_left_running(
    served: Served, lease: dict[str, Any], missing: str
) -> None:
    os.unlink(Path(lease["console"]).with_name(missing))
    error = served.call("launch", **lease)["error"]
    assert error["code"] == "not_found"
    assert missing in error["message"]
    assert served.call("status")["result"]["leases"][0]["pid"] is None


def test_lease_without_a_jail_is_not_launched(served: Served, lease: dict[str, Any]) -> None:
    params = build_params(3)
    assert served.call("prepare", **params)["result"]["jail"] is None
    error = served.call("launch", **{**lease, "id": params["vm_id"]})["error"]
    assert error["reason"] == "unsupported"
    served.call("release", id=params["vm_id"])
