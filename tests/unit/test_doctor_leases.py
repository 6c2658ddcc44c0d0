"""Doctor's checks of what VMs hold: helper, leases, leftovers."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.doctor import DoctorFacts, HelperFacts, Undecided
from banger.api.params import Doctor
from banger.doctor.world import Store
from fakes.doctor import FakeWorld, lease, running, vm


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


def helper(*leases: Any, **changes: Any) -> HelperFacts:
    return HelperFacts(**{"privilege": "root", "version": 1, "leases": leases, **changes})


class Line:
    """A daemon that sweeps; remembers what it was asked."""

    def __init__(self, *swept: str) -> None:
        self.swept = swept
        self.asked: list[tuple[str, Any]] = []

    def call(self, method: str, params: Any, result: type[Any]) -> Any:
        self.asked.append((method, params))
        facts = running(swept=self.swept).facts
        assert result is DoctorFacts and facts is not None
        return facts

    def stream(self, *_: Any) -> Any:
        raise AssertionError


# Helper


def test_a_helper_that_answers_passes(world: FakeWorld) -> None:
    assert world.row("helper").level == "PASS"


def test_a_damaged_ledger_fails(world: FakeWorld) -> None:
    world.known["helper"] = helper(ledger_problems=("x.json cannot be read",))
    levels = [row.level for row in world.look("helper")]
    assert levels == ["PASS", "FAIL"]


def test_user_mode_without_a_helper_is_a_warning_that_names_what_is_missing(
    world: FakeWorld,
) -> None:
    world.known["helper"] = HelperFacts(privilege="none", problem="no sudo", hint="sudo -v")
    row = world.row("helper")
    assert (row.level, row.command) == ("WARN", "sudo -v")


def test_a_helper_that_does_not_answer_fails(world: FakeWorld) -> None:
    world.known["helper"] = HelperFacts(privilege="root", problem="it ended")
    assert world.row("helper").level == "FAIL"
    world.paths = msgspec.structs.replace(world.paths, mode="system")
    row = world.row("helper")
    assert (row.level, row.command) == ("FAIL", "sudo systemctl restart bangerd-root")


# Leases


def test_leases_of_running_vms_pass(world: FakeWorld) -> None:
    web = vm()
    world.set_vms(web)
    world.known["helper"] = helper(lease(web))
    assert world.row("leases").level == "PASS"


@pytest.mark.parametrize("known", [True, False])
def test_a_lease_of_no_running_vm_is_given_back_by_fix(world: FakeWorld, known: bool) -> None:
    web = vm(state="stopped")
    if known:
        world.set_vms(web, live=False)
    world.known["helper"] = helper(lease(web))
    row = world.row("leases")
    assert (row.level, row.fixable, row.command) == ("WARN", True, "banger doctor --fix")
    assert ("VM web, which is stopped" if known else "no VM (00000000)") in row.details[0]
    line = world.line = Line("released a lease")
    world.known["daemon"] = running()
    assert world.fix("leases") == ["released a lease"]
    assert line.asked == [("daemon.doctor", Doctor(sweep=True))]


def test_fix_starts_a_daemon_and_says_so(world: FakeWorld) -> None:
    world.line = Line()
    (did,) = world.fix("leases")
    assert did.startswith("started the daemon")


def test_a_vm_that_is_just_being_started_holds_its_lease_rightly(world: FakeWorld) -> None:
    web = vm(state="created")
    world.set_vms(web, live=False)
    world.known["daemon"] = running(busy=(web.id,))
    world.known["helper"] = helper(lease(web))
    assert world.row("leases").level == "PASS"


def test_a_running_vm_without_a_lease_fails(world: FakeWorld) -> None:
    world.set_vms(vm())
    row = world.row("leases")
    assert (row.level, row.command) == ("FAIL", "banger vm restart web")


def test_a_vm_on_the_user_network_needs_no_lease(world: FakeWorld) -> None:
    world.set_vms(vm(network="user"))
    assert world.row("leases").level == "PASS"


def test_leases_are_not_judged_by_a_database_that_cannot_be_read(world: FakeWorld) -> None:
    world.known["helper"] = helper(lease(vm()))
    world.known["store"] = Store(problem="damaged")
    for check in ("leases", "leftovers"):
        row = world.row(check)
        assert (row.level, row.fixable) == ("PASS", False)


# Leftovers


def places(world: FakeWorld) -> None:
    del world.known["vm_places"]


def test_nothing_left_over_passes(world: FakeWorld) -> None:
    web = vm()
    world.set_vms(web)
    paths = world.paths.vm(web.id)
    for directory in (paths.directory, paths.runtime):
        directory.mkdir(parents=True)
    (paths.runtime / "api.sock").touch()
    places(world)
    assert world.row("leftovers").level == "PASS"


def test_directories_and_sockets_of_no_vm_are_found(world: FakeWorld) -> None:
    web, gone = vm(), vm("gone", 3)
    world.set_vms(web, live=False)
    for record in (web, gone):
        paths = world.paths.vm(record.id)
        paths.directory.mkdir(parents=True, exist_ok=True)
        paths.runtime.mkdir(parents=True, exist_ok=True)
        (paths.runtime / "api.sock").touch()
    # Ids share their first digits here, so the short directory is of both: make another.
    (world.paths.runtime / "vms" / "abcdefabcdef").mkdir()
    (world.paths.vms / "somebody-elses").mkdir()
    places(world)
    row = world.row("leftovers")
    assert (row.level, row.fixable) == ("WARN", True)
    assert row.details == (
        f"VM directory {world.paths.vm(gone.id).directory} without a VM",
        f"sockets in {world.paths.vm(web.id).runtime} of a VM that does not run",
        f"sockets in {world.paths.runtime / 'vms' / 'abcdefabcdef'} without a VM",
    )


def test_what_is_left_of_a_deleted_vm_is_given_back_by_fix(world: FakeWorld) -> None:
    aside = world.paths.vms / f".delete-{vm().id}"
    aside.mkdir(parents=True)
    places(world)
    row = world.row("leftovers")
    assert (row.level, row.fixable) == ("WARN", True)
    assert row.details == (f"what is left of a deleted VM in {aside}",)


def test_what_the_daemon_could_not_decide_is_a_row_each_and_told_once(world: FakeWorld) -> None:
    gone = world.paths.vm("ab" * 16).directory
    gone.mkdir(parents=True)
    world.known["daemon"] = running(
        undecided=(
            Undecided(what="a machine of VM web runs (pid 7)", command="banger vm kill web"),
            Undecided(what=f"{gone} holds disks", command=f"rm -r {gone}", level="WARN"),
            Undecided(what="whether VM db runs is not known", command="banger doctor --fix"),
        )
    )
    places(world)
    assert [(row.level, row.command, row.fixable) for row in world.look("leftovers")] == [
        ("FAIL", "banger vm kill web", False),
        ("WARN", f"rm -r {gone}", False),
        ("FAIL", "banger doctor --fix", True),
    ]


def test_sockets_of_a_vm_that_is_being_started_are_no_leftovers(world: FakeWorld) -> None:
    web = vm(state="created")
    world.set_vms(web, live=False)
    world.paths.vm(web.id).runtime.mkdir(parents=True)
    (world.paths.vm(web.id).runtime / "api.sock").touch()
    world.known["daemon"] = running(busy=(web.id,))
    places(world)
    assert world.row("leftovers").level == "PASS"


@pytest.fixture
def vmm(world: FakeWorld) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a VMM of this installation, in the directory of no VM."""
    home = world.paths.runtime / "vms" / "0123456789ab"
    home.mkdir(parents=True)
    program = home.parent.parent / "firecracker"
    shutil.copy2(os.path.realpath(sys.executable), program)
    with subprocess.Popen(
        [str(program), "-I", "-S", "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
        cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PYTHONHOME": sys.base_prefix},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_vmm_of_no_vm_is_named_with_its_pid(
    world: FakeWorld, vmm: subprocess.Popen[bytes]
) -> None:
    world.root = Path("/")
    row = world.row("leftovers")
    assert (row.level, row.command, row.fixable) == ("FAIL", f"kill {vmm.pid}", False)


def test_a_jailed_vmm_is_known_by_the_id_that_the_jailer_passed_on(world: FakeWorld) -> None:
    world.paths = msgspec.structs.replace(world.paths, mode="system")
    web, gone = vm("web", 0xABC << 100), vm("gone", 0xDEF << 100)
    world.set_vms(web)
    for pid, record in ((7, web), (8, gone)):
        words = ["/firecracker", "--id", record.id, "--api-sock", "api.sock"]
        world.have(f"/proc/{pid}/cmdline", "\0".join(words) + "\0")
    row = world.row("leftovers")
    assert (row.level, row.command) == ("FAIL", "kill 8")


def staging(world: FakeWorld) -> list[Path]:
    found = [
        world.paths.images / ".build-debian-12345678",
        world.paths.kernels / ".pull-debian-6.12-0a0b0c0d",
        world.paths.build_cache / "images" / "debian" / ".build-89abcdef",
        world.paths.state / ".bin-download-00112233",
    ]
    for path in found:
        (path / "tree").mkdir(parents=True)
        (path / "tree" / "file").write_text("half")
    return found


def test_what_an_interrupted_build_left_is_removed_by_fix(world: FakeWorld) -> None:
    found = staging(world)
    (world.paths.images / ".debian.lock").touch()
    kept = world.paths.images / ("a" * 32)
    kept.mkdir()
    row = world.row("leftovers")
    assert (row.level, row.fixable) == ("WARN", True)
    assert sorted(row.details) == sorted(map(str, found))
    world.line = Line()
    world.known["daemon"] = running()
    assert sorted(world.fix("leftovers")) == sorted(f"removed {path}" for path in found)
    assert not any(path.exists() for path in found)
    assert kept.exists()
    assert world.row("leftovers").level == "PASS"


def test_a_build_under_way_is_left_alone(world: FakeWorld) -> None:
    path = staging(world)[0]
    with (world.paths.images / ".debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert str(path) not in world.row("leftovers").details
        world.line = Line()
        world.known["daemon"] = running()
        world.fix("leftovers")
        assert path.exists()
