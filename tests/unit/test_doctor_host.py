"""Doctor's checks of the host: architecture, control groups, namespaces, tools, clock, VMM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from banger.api.doctor import HelperFacts
from banger.config.system_paths import SystemPaths
from banger.doctor import host
from banger.doctor import vmm as vmm_checks
from banger.kernel.build_tools import BUILD_TOOLS
from banger.vmm.kvm_probe import Problem
from banger.vmm.programs import Program
from fakes.doctor import FakeWorld, verdict

NO_KVM = Problem(about="kvm", message="this host offers no KVM", hint="sudo modprobe kvm_intel")
DENIED = Problem(
    about="kvm",
    message="/dev/kvm may not be opened",
    hint="sudo usermod -aG kvm ann   (then log in again)",
)
NO_FIRECRACKER = Problem(about="firecracker", message="firecracker is missing", hint="x")
NO_QEMU = Problem(about="qemu", message="qemu is missing", hint="sudo apt-get install qemu")


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


def test_another_architecture_fails(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.row("architecture").level == "PASS"
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    assert world.row("architecture").level == "FAIL"


# VMM


def without_kvm(**changes: Any) -> Any:
    facts: dict[str, Any] = {
        "driver": "qemu", "accel": "tcg", "kvm_usable": False, "kvm_kind": "absent",
        "problems": (NO_KVM,), "firecracker": None,
    }  # fmt: skip
    return verdict(**{**facts, **changes})


def test_firecracker_with_kvm_passes_with_the_evidence(world: FakeWorld) -> None:
    row = world.row("vmm")
    assert row.level == "PASS"
    assert "firecracker 1.12.1" in row.message
    assert row.details == ("the vCPU computed what it should",)


def test_emulation_is_a_warning_with_the_command_for_kvm(world: FakeWorld) -> None:
    world.known["verdict"] = without_kvm()
    row = world.row("vmm")
    assert row.level == "WARN"
    assert row.command == "sudo modprobe kvm_intel"
    assert "this host offers no KVM" in row.details


def test_no_vmm_at_all_fails(world: FakeWorld) -> None:
    problems = (NO_KVM, NO_FIRECRACKER, NO_QEMU)
    world.known["verdict"] = without_kvm(driver=None, qemu=None, problems=problems)
    row = world.row("vmm")
    assert row.level == "FAIL"
    assert row.command == "sudo apt-get install qemu"


def test_a_configured_vmm_that_cannot_run_fails(world: FakeWorld) -> None:
    world.known["verdict"] = without_kvm()
    world.set_settings(vmm="firecracker")
    assert world.row("vmm").level == "FAIL"


def test_the_device_without_access_names_group_and_command(world: FakeWorld) -> None:
    world.have("/dev/kvm").chmod(0o660)
    assert world.row("kvm access").level == "PASS"
    world.known["verdict"] = without_kvm(kvm_kind="denied", problems=(DENIED,))
    row = world.row("kvm access")
    assert row.level == "WARN"
    assert "the group root" in row.message
    # As it can be typed: without the remark.
    assert row.command == "sudo usermod -aG kvm ann"
    world.known["verdict"] = without_kvm(kvm_kind="denied", problems=(DENIED,), qemu=None)
    assert world.row("kvm access").level == "FAIL"


def test_a_host_without_the_device_has_nothing_to_have_access_to(world: FakeWorld) -> None:
    assert world.row("kvm access").level == "PASS"


def test_missing_firecracker_is_fetched_by_fix(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.known["verdict"] = without_kvm(problems=(NO_FIRECRACKER,))
    row = world.row("firecracker")
    assert (row.level, row.fixable, row.command) == ("WARN", True, "banger doctor --fix")
    world.set_settings(vmm="firecracker")
    assert world.row("firecracker").level == "FAIL"
    fetched: list[Path] = []

    def fetch(directory: Path) -> tuple[Path, ...]:
        fetched.append(directory)
        return directory / "firecracker", directory / "jailer"

    monkeypatch.setattr(vmm_checks, "fetch_firecracker", fetch)
    (did,) = world.fix("firecracker")
    assert fetched == [world.paths.state / "bin"]
    assert did == f"fetched firecracker and jailer 1.12.1 into {world.paths.state / 'bin'}"


def test_a_firecracker_of_the_users_is_never_replaced(world: FakeWorld) -> None:
    world.known["verdict"] = without_kvm(problems=(NO_FIRECRACKER,))
    world.set_settings(firecracker_bin="/opt/firecracker")
    assert not world.row("firecracker").fixable
    world.set_settings()
    world.says("firecracker", out="")
    row = world.row("firecracker")
    assert not row.fixable
    assert row.command is not None and row.command.startswith("$EDITOR")


def test_a_newer_firecracker_passes_with_the_remark(world: FakeWorld) -> None:
    newer = Program(path=Path("/f"), version="1.99.0", remark="newer than 1.12.1")
    world.known["verdict"] = verdict(firecracker=newer)
    assert "newer than 1.12.1" in world.row("firecracker").message


def test_qemu_is_needed_only_where_it_serves(world: FakeWorld) -> None:
    assert world.row("qemu").level == "PASS"
    world.known["verdict"] = verdict(qemu=None, problems=(NO_QEMU,))
    assert world.row("qemu").level == "PASS"
    for change in (
        lambda: world.set_settings(vmm="qemu"),
        lambda: world.known.update(helper=HelperFacts(privilege="none", problem="no sudo")),
    ):
        world.set_settings()
        change()
        row = world.row("qemu")
        assert (row.level, row.command) == ("FAIL", "sudo apt-get install qemu")


# Jailer (system mode)


@pytest.fixture
def system(tmp_path: Path) -> FakeWorld:
    """A system installation below a directory."""
    import msgspec

    world = FakeWorld(tmp_path)
    world.paths = msgspec.structs.replace(
        world.paths, mode="system", system=SystemPaths(root=tmp_path / "sys")
    )
    return world


def installed_jailer(world: FakeWorld, tmp_path: Path, version: str = "1.12.1") -> Path:
    directory = tmp_path / "programs"
    directory.mkdir()
    for name in ("firecracker", "jailer"):
        (directory / name).write_text("program")
        (directory / name).chmod(0o755)
    firecracker = Program(path=directory / "firecracker", version="1.12.1")
    world.known["verdict"] = verdict(firecracker=firecracker)
    world.says(str(directory / "jailer"), "--version", out=f"jailer v{version}\n")
    return directory


def test_user_mode_needs_no_jailer(world: FakeWorld) -> None:
    assert world.row("jailer").level == "PASS"


def test_a_jailer_of_firecrackers_version_passes(system: FakeWorld, tmp_path: Path) -> None:
    installed_jailer(system, tmp_path)
    if os.geteuid() != 0:
        pytest.skip("needs root: what root may trust is root's")
    assert system.row("jailer").level == "PASS"


def test_a_missing_jailer_fails_and_fix_fetches_it(system: FakeWorld, tmp_path: Path) -> None:
    (installed_jailer(system, tmp_path) / "jailer").unlink()
    row = system.row("jailer")
    assert (row.level, row.fixable) == ("FAIL", True)


def test_a_jailer_of_another_version_fails(system: FakeWorld, tmp_path: Path) -> None:
    installed_jailer(system, tmp_path, version="1.10.0")
    row = system.row("jailer")
    assert row.level == "FAIL"
    assert "is 1.10.0, firecracker is 1.12.1" in row.message


def test_a_jailer_that_others_can_change_fails(system: FakeWorld, tmp_path: Path) -> None:
    directory = installed_jailer(system, tmp_path)
    (directory / "jailer").chmod(0o777)
    row = system.row("jailer")
    assert row.level == "FAIL"
    assert row.command == "sudo banger system install --owner $USER"


def test_a_jailer_that_is_switched_off_is_a_warning(system: FakeWorld) -> None:
    system.set_settings(jailer_enabled=False)
    assert system.row("jailer").level == "WARN"


# The rest of the host

CGROUP2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
HYBRID = "42 32 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "controllers", "level", "command"),
    [
        (CGROUP2, "cpuset cpu io memory pids", "PASS", None),
        ("", "", "WARN", "sudo mount -t cgroup2 none /sys/fs/cgroup"),
        (CGROUP2, "cpu io", "WARN", None),
        (HYBRID, "", "WARN", host._UNIFY),
    ],
)
def test_cgroup(
    world: FakeWorld, mounts: str, controllers: str, level: str, command: str | None
) -> None:
    world.have("/proc/self/mountinfo", mounts)
    for place in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        world.have(f"{place}/cgroup.controllers", controllers + "\n")
    row = world.row("cgroup")
    assert (row.level, row.command) == (level, command)


def namespaces(tmp_path: Path) -> FakeWorld:
    """A host on which an ordinary user builds images."""
    world = FakeWorld(tmp_path, uid=61234)
    world.have("/etc/subuid", "61234:100000:65536\n")
    world.have("/etc/subgid", "61234:100000:65536\n")
    world.says("newuidmap", out="")
    world.says("unshare", "--user", "true", out="")
    return world


def test_an_ordinary_user_can_build_images(tmp_path: Path) -> None:
    assert namespaces(tmp_path).row("user namespaces").level == "PASS"


def test_root_needs_no_user_namespace(tmp_path: Path) -> None:
    assert FakeWorld(tmp_path, uid=0).row("user namespaces").level == "PASS"


@pytest.mark.parametrize(
    ("break_it", "command"),
    [
        (
            lambda w: w.have("/proc/sys/user/max_user_namespaces", "0\n"),
            "sudo sysctl user.max_user_namespaces=10000",
        ),
        (
            lambda w: w.have("/proc/sys/kernel/unprivileged_userns_clone", "0\n"),
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        ),
        (lambda w: w.programs.pop("newuidmap"), "sudo apt-get install uidmap"),
        (
            lambda w: w.have("/etc/subgid", "somebody:1:2\n"),
            "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 61234",
        ),
    ],
)
def test_what_keeps_images_from_being_built_fails_with_its_command(
    tmp_path: Path, break_it: Any, command: str
) -> None:
    world = namespaces(tmp_path)
    break_it(world)
    row = world.row("user namespaces")
    # The default image is not built yet.
    assert (row.level, row.command) == ("FAIL", command)


def test_apparmors_restriction_is_a_warning_with_its_sysctl(tmp_path: Path) -> None:
    world = namespaces(tmp_path)
    world.says("unshare", "--user", "true", out=None)
    assert world.row("user namespaces").level == "WARN"
    world.have("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    command = world.row("user namespaces").command
    assert command == "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"


def build_tools(world: FakeWorld) -> None:
    for tool in BUILD_TOOLS:
        if "/" in tool.name:
            world.have(tool.name)
        else:
            world.says(tool.name, out="")


def all_tools(world: FakeWorld) -> None:
    build_tools(world)
    for tool in host.TOOLS:
        world.says(tool.name, out="")
    world.says("sqfstar", "-version", out="sqfstar version 4.5.1 (2022/03/17)\n")
    world.says("apt-get", out="")


def test_all_tools_pass(world: FakeWorld) -> None:
    all_tools(world)
    assert world.row("host tools").level == "PASS"


@pytest.mark.parametrize("name", ["mke2fs", "mmdebstrap", "sqfstar"])
def test_a_tool_that_the_next_vm_needs_fails(world: FakeWorld, name: str) -> None:
    all_tools(world)
    del world.programs[name]
    row = world.row("host tools")
    assert row.level == "FAIL"
    (tool,) = [t for t in host.TOOLS if t.name == name]
    assert row.command == f"sudo apt-get install {tool.apt}"


@pytest.mark.parametrize("name", ["git", "ssh"])
def test_a_tool_of_one_command_is_a_warning(world: FakeWorld, name: str) -> None:
    all_tools(world)
    del world.programs[name]
    assert world.row("host tools").level == "WARN"


def test_what_only_a_kernel_build_needs_is_no_warning(world: FakeWorld) -> None:
    all_tools(world)
    assert world.row("host tools").details == ()
    del world.programs["flex"]
    world.file("/usr/include/libelf.h").unlink()
    row = world.row("host tools")
    assert row.level == "PASS"
    assert row.details == (
        "kernel build would need flex, /usr/include/libelf.h: sudo apt-get install flex libelf-dev",
    )


def test_packages_are_named_as_the_hosts_own_manager_knows_them(world: FakeWorld) -> None:
    all_tools(world)
    del world.programs["ssh"], world.programs["apt-get"]
    world.says("dnf", out="")
    assert world.row("host tools").command == "sudo dnf install openssh-clients"
    del world.programs["dnf"]
    world.says("pacman", out="")
    assert world.row("host tools").command == "sudo pacman -S openssh"


def test_an_old_sqfstar_fails(world: FakeWorld) -> None:
    all_tools(world)
    world.says("sqfstar", "-version", out="sqfstar version 4.4\n")
    row = world.row("host tools")
    assert row.level == "FAIL"
    assert row.command == "sudo apt-get install squashfs-tools"


@pytest.mark.parametrize(("synchronised", "level"), [(True, "PASS"), (False, "WARN")])
def test_clock(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, synchronised: bool, level: str
) -> None:
    monkeypatch.setattr(host, "clock_is_synchronised", lambda: synchronised)
    assert world.row("clock").level == level


def test_the_kernel_tells_about_its_clock() -> None:
    assert host.clock_is_synchronised() in (True, False)
