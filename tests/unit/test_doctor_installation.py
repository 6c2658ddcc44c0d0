"""Doctor's checks of the installation and of what guests are made of."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import __version__
from banger.api.doctor import HelperFacts
from banger.config.install import InstallRecord, format_install_record
from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT, SystemPaths
from banger.disk.identity import FileIdentity
from banger.doctor import guest, installation
from banger.doctor.table import CHECKS
from banger.doctor.trust import distrust
from banger.doctor.world import DaemonLook
from banger.image.entries import ImageManifest, write_manifest
from banger.kernel.build_tools import BUILD_TOOLS
from banger.kernel.entries import KernelManifest
from banger.kernel.entries import write_manifest as write_kernel_manifest
from banger.ssh.client_config import edit_block
from banger.ssh.keys import ensure_owner_key
from fakes.doctor import FakeWorld, running

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: what is judged is root's")


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


@pytest.fixture
def system(tmp_path: Path) -> FakeWorld:
    """A system installation below a directory, as `system install` leaves it."""
    paths = SystemPaths(root=tmp_path / "sys")
    release = paths.versions / "0.1.0+abc"
    for file in (
        release / "bin/banger",
        release / "bin/bangerd",
        release / "banger-root.pyz",
        release / "libexec/firecracker",
        paths.units / DAEMON_UNIT,
        paths.units / HELPER_UNIT,
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("file")
    paths.current.symlink_to(release)
    paths.bin.mkdir(parents=True)
    for name in ("banger", "bangerd"):
        (paths.bin / name).symlink_to(paths.current / "bin" / name)
    paths.helper_state.mkdir(parents=True)
    paths.etc.mkdir(parents=True)
    record = InstallRecord(
        owner="ann", uid=os.geteuid(), gid=os.getegid(), home=str(tmp_path), installed_at="now",
        version=__version__,
    )  # fmt: skip
    paths.record.write_bytes(format_install_record(record))
    world = FakeWorld(tmp_path)
    world.paths = msgspec.structs.replace(world.paths, mode="system", system=paths)
    return world


# Version


def test_one_version_everywhere_passes(world: FakeWorld) -> None:
    world.known["daemon"] = running()
    assert world.row("version").level == "PASS"


@pytest.mark.parametrize("development", [True, False])
def test_a_daemon_of_another_version_is_a_warning_but_for_developers(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, development: bool
) -> None:
    monkeypatch.setattr(installation, "is_development", lambda: development)
    world.known["daemon"] = running(version="9.9.9")
    row = world.row("version")
    assert row.level == ("PASS" if development else "WARN")
    assert "9.9.9" in " ".join((row.message, *row.details))
    if not development:
        assert row.command == "banger daemon stop"


def test_another_release_or_helper_is_a_warning(
    system: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "is_development", lambda: False)
    assert system.row("version").level == "PASS"
    system.known["helper"] = HelperFacts(privilege="service", version=7)
    assert system.row("version").command == "sudo banger system restart"
    text = system.paths.system.record.read_text()
    system.paths.system.record.write_text(text.replace(__version__, "0.0.1"))
    del system.known["record"]
    row = system.row("version")
    assert row.command == "sudo banger system install --owner $USER"


# Daemon


def test_in_user_mode_no_daemon_needs_to_run(world: FakeWorld) -> None:
    assert world.row("daemon").level == "PASS"
    world.known["daemon"] = running()
    assert "pid 4711" in world.row("daemon").message


def test_in_system_mode_the_daemon_has_to_run(system: FakeWorld) -> None:
    row = system.row("daemon")
    assert (row.level, row.command) == ("FAIL", "sudo banger system restart")


def test_a_daemon_that_does_not_answer_fails(world: FakeWorld) -> None:
    world.known["daemon"] = DaemonLook(state="mute", problem="no answer within 90 s")
    row = world.row("daemon")
    assert (row.level, row.command) == ("FAIL", "banger daemon stop")
    assert "no answer within 90 s" in row.message


# Installed files


@needs_root
def test_files_that_are_roots_alone_pass(system: FakeWorld) -> None:
    row = system.row("installed files")
    assert row.level == "PASS", row.details


@needs_root
@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: (p.current.resolve() / "banger-root.pyz").chmod(0o666),
        lambda p: os.chown(p.current.resolve() / "bin/banger", 1000, 1000),
        lambda p: p.versions.chmod(0o777),
        lambda p: (p.units / DAEMON_UNIT).unlink(),
        lambda p: os.chown(p.record, 1000, 1000),
    ],
)
def test_a_file_that_others_can_change_fails(system: FakeWorld, spoil: Any) -> None:
    spoil(system.paths.system)
    row = system.row("installed files")
    assert (row.level, row.command) == ("FAIL", "sudo banger system install --owner $USER")


@needs_root
def test_trust_follows_links_to_where_they_lead(tmp_path: Path) -> None:
    open_place = tmp_path / "open"
    open_place.mkdir()
    open_place.chmod(0o777)
    (open_place / "file").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(open_place / "file")
    assert distrust(tmp_path / "open" / "file") is not None
    why = distrust(link)
    assert why is not None and str(open_place) in why
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert distrust(loop) is not None


def test_user_mode_has_nothing_installed_for_root(world: FakeWorld) -> None:
    assert world.row("installed files").level == "PASS"


# Units


def show(world: FakeWorld, unit: str, **changes: str) -> None:
    wanted = installation._PROPERTIES[unit]
    names = ["ActiveState", "SubState", "LoadState", "NeedDaemonReload", *wanted]
    found = {
        "ActiveState": "active", "SubState": "running", "LoadState": "loaded",
        "NeedDaemonReload": "no", **wanted, **changes,
    }  # fmt: skip
    text = "".join(f"{name}={value}\n" for name, value in found.items())
    world.says("systemctl", "show", unit, f"--property={','.join(names)}", out=text)


def test_active_and_restricted_units_pass(system: FakeWorld) -> None:
    show(system, DAEMON_UNIT)
    show(system, HELPER_UNIT)
    assert [row.level for row in system.look("units")] == ["PASS", "PASS"]


@pytest.mark.parametrize(
    ("changes", "level", "command"),
    [
        ({"ActiveState": "failed"}, "FAIL", "sudo banger system restart"),
        ({"LoadState": "not-found"}, "FAIL", "sudo banger system install --owner $USER"),
        (
            {"NeedDaemonReload": "yes"},
            "WARN",
            "sudo systemctl daemon-reload && sudo banger system restart",
        ),
        ({"ProtectSystem": "no"}, "WARN", "sudo banger system install --owner $USER"),
    ],
)
def test_units(system: FakeWorld, changes: dict[str, str], level: str, command: str) -> None:
    show(system, HELPER_UNIT)
    show(system, DAEMON_UNIT, **changes)
    row = system.look("units")[0]
    assert (row.level, row.command) == (level, command)


def test_the_units_that_are_installed_have_the_restrictions_that_are_looked_for() -> None:
    units = Path(installation.__file__).parents[1] / "system" / "units"
    for unit, wanted in installation._PROPERTIES.items():
        lines = (units / unit).read_text().splitlines()
        for name, value in wanted.items():
            assert f"{name}={value}" in lines, f"{unit}: {name}"


def test_every_check_answers_on_a_system_installation(system: FakeWorld) -> None:
    system.known["helper"] = HelperFacts(privilege="service", version=1)
    for check in CHECKS:
        rows = system.look(check.name)
        assert rows, check.name
        assert not [row for row in rows if "could not be looked at" in row.message]


def test_user_mode_has_no_units(world: FakeWorld) -> None:
    assert world.look("units") == []


# Agent


def agent(world: FakeWorld, monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    monkeypatch.setattr(guest, "agent_binary", lambda: Path("/agent"))
    world.says("/agent", "--version", out=said)


def test_agent(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    agent(world, monkeypatch, f"banger-vsock-agent {__version__} (protocol 1)\n")
    assert world.row("agent").level == "PASS"
    for said in ("banger-vsock-agent 9.9.9 (protocol 1)\n", None):
        agent(world, monkeypatch, said)
        row = world.row("agent")
        assert (row.level, row.command) == ("FAIL", "make agent")


def test_a_missing_agent_fails(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    from banger.errors import BangerError

    def missing() -> Path:
        raise BangerError("not_found", "it is not here", hint="make agent")

    monkeypatch.setattr(guest, "agent_binary", missing)
    row = world.row("agent")
    assert (row.level, row.command) == ("FAIL", "make agent")


# Image and kernel


def image(world: FakeWorld, **changes: Any) -> Path:
    directory = world.paths.images / ("a" * 32)
    directory.mkdir(parents=True)
    (directory / "rootfs.sqfs").write_bytes(b"12345")
    fields: dict[str, Any] = {
        "name": "debian-bookworm", "distro": "debian", "arch": "amd64",
        "kernel_ref": "debian-6.12-cloud", "rootfs_file": "rootfs.sqfs", "rootfs_sha256": "0" * 64,
        "rootfs_bytes": 5, "rootfs_mtime_ns": 0, "recipe": "debian-bookworm",
    }  # fmt: skip
    write_manifest(directory, ImageManifest(**{**fields, **changes}))
    return directory


def test_the_default_image_is_here_or_can_be_built(world: FakeWorld) -> None:
    assert "builds it from its recipe" in world.row("default image").message
    image(world)
    row = world.row("default image")
    assert row.level == "PASS"
    assert "debian-bookworm is here" in row.message


def test_a_default_image_that_nobody_knows_fails(world: FakeWorld) -> None:
    world.set_settings(default_image_name="nonsense")
    row = world.row("default image")
    assert (row.level, row.command) == ("FAIL", f"$EDITOR {world.paths.config_file}")


def test_a_default_image_that_was_changed_fails(world: FakeWorld) -> None:
    (image(world) / "rootfs.sqfs").write_bytes(b"123456")
    row = world.row("default image")
    assert row.level == "FAIL"
    assert row.command == (
        "banger image build --force --name debian-bookworm --recipe debian-bookworm"
    )


def test_parts_that_could_not_be_had_are_a_warning(world: FakeWorld) -> None:
    image(world, optional_missing=("opencode",))
    row = world.row("default image")
    assert row.level == "WARN"
    assert "opencode" in row.message


def test_the_default_kernel_is_here_or_in_the_catalog(world: FakeWorld) -> None:
    assert world.row("default kernel").level == "PASS"
    world.set_settings(default_kernel_ref="nonsense")
    row = world.row("default kernel")
    assert (row.level, row.command) == ("FAIL", "banger kernel list --available")


def test_a_default_kernel_that_must_be_built_needs_the_tools_for_it(world: FakeWorld) -> None:
    world.set_settings(default_kernel_ref="generic-6.12")
    row = world.row("default kernel")
    assert row.level == "FAIL"
    assert "gcc, /usr/include/stdlib.h, ld, make, flex" in row.message
    assert row.command is not None
    assert row.command.startswith("sudo apt-get install gcc libc6-dev binutils make flex")
    for tool in BUILD_TOOLS:
        if "/" in tool.name:
            world.have(tool.name)
        else:
            world.says(tool.name, out="")
    row = world.row("default kernel")
    assert (row.level, row.command) == ("WARN", "banger kernel build generic-6.12")


def test_a_kernel_without_one_of_its_files_fails(world: FakeWorld) -> None:
    directory = world.paths.kernels / "debian-6.12-cloud"
    directory.mkdir(parents=True)
    identity = FileIdentity(sha256="0" * 64, size_bytes=1, mtime_ns=0)
    names = ("vmlinux", "initrd.img", "modules.sqfs")
    for name in names:
        (directory / name).write_bytes(b"x")
    write_kernel_manifest(
        directory,
        KernelManifest(
            name="debian-6.12-cloud", distro="debian", arch="amd64", kernel_version="6.12",
            release="1", source="apt", agent_version="x", imported_at="now",
            files=dict.fromkeys(names, identity),
        ),
    )  # fmt: skip
    assert "is here (Linux 6.12)" in world.row("default kernel").message
    (directory / "modules.sqfs").unlink()
    row = world.row("default kernel")
    assert (row.level, row.command) == ("FAIL", "banger kernel pull debian-6.12-cloud --force")


# ssh


def test_a_private_key_passes_and_one_that_is_not_made_yet(world: FakeWorld) -> None:
    assert world.row("ssh key").level == "PASS"
    ensure_owner_key(world.paths.ssh_key)
    assert world.row("ssh key").level == "PASS"


def test_a_key_that_others_can_read_is_mended_by_fix(world: FakeWorld) -> None:
    key = world.paths.ssh_key
    ensure_owner_key(key)
    key.chmod(0o644)
    row = world.row("ssh key")
    assert (row.level, row.fixable, row.command) == ("FAIL", True, f"chmod 600 {key}")
    assert world.fix("ssh key") == [f"changed the mode of {key} from 0644 to 0600"]
    assert world.row("ssh key").level == "PASS"


def test_a_key_of_the_users_own_is_left_to_the_user(world: FakeWorld, tmp_path: Path) -> None:
    key = tmp_path / "mine"
    ensure_owner_key(key)
    key.chmod(0o644)
    world.set_settings(ssh_key_path=str(key))
    row = world.row("ssh key")
    assert (row.level, row.fixable) == ("FAIL", False)
    assert world.fix("ssh key") == []
    assert stat.S_IMODE(key.stat().st_mode) == 0o644
    assert row.command is not None
    subprocess.run(shlex.split(row.command), check=True)
    assert world.row("ssh key").level == "PASS"


def test_a_file_that_is_no_key_fails(world: FakeWorld) -> None:
    world.paths.ssh.mkdir(parents=True)
    world.paths.ssh_key.write_text("no key")
    world.paths.ssh_key.chmod(0o600)
    row = world.row("ssh key")
    assert row.level == "FAIL"
    assert row.command is not None
    subprocess.run(shlex.split(row.command), check=True)
    assert world.row("ssh key").level == "PASS"


def test_a_key_with_a_passphrase_fails(world: FakeWorld) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh-keygen (Debian package openssh-client)")
    world.paths.ssh.mkdir(parents=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(world.paths.ssh_key)],
        check=True,
    )
    row = world.row("ssh key")
    assert row.level == "FAIL"
    assert "passphrase" in row.message


def test_ssh_config_is_a_warning_only_where_it_was_asked_for(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert world.row("ssh_config").level == "PASS"
    written = world.paths.ssh_config
    written.parent.mkdir(parents=True)
    written.touch()
    row = world.row("ssh_config")
    assert (row.level, row.command) == ("WARN", "banger ssh-config --install")
    own = tmp_path / ".ssh" / "config"
    own.parent.mkdir()
    edit_block(own, written, wanted=True)
    assert world.row("ssh_config").level == "PASS"
