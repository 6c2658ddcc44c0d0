"""`banger system install` and `uninstall`, into a tree below the test's own directory.

systemctl is a fake on PATH that notes what it is told; everything else is real: the release is
copied, compiled and run.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger.config.install import InstallRecord, read_install_record
from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT, SystemPaths
from banger.errors import BangerError
from banger.system import release, requirements, uninstaller
from banger.system.helper_line import Released
from banger.system.installer import build_record, find_owner, install
from banger.system.uninstaller import uninstall
from banger.system.zipapp import helper_archive
from fakes.systemctl import Systemctl

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real release, made once: the others are copies that the tests change."""
    versions = tmp_path_factory.mktemp("release") / "versions"
    return release.stage_release(versions, interpreters=_interpreters())


def _interpreters() -> list[Path]:
    # Below /tmp nobody's directory is root's alone; the interpreter still has to be.
    return [Path("/usr/bin/python3")]


class Host:
    """A host's tree, and what was said while it changed."""

    def __init__(self, root: Path, systemctl: Systemctl, built: Path) -> None:
        self.root = root
        self.system = SystemPaths(root=root / "host")
        self.systemctl = systemctl
        self.said: list[str] = []
        self.system.systemd.mkdir(parents=True)
        self.home = root / "home"
        self.home.mkdir()
        entry = pwd.getpwnam("daemon") if IS_ROOT else pwd.getpwuid(os.geteuid())
        self.owner = msgspec.structs.replace(build_record(entry), home=str(self.home))
        if IS_ROOT:
            os.chown(self.home, self.owner.uid, self.owner.gid)
        self.built = built

    def install(self, *, force: bool = False, owner: InstallRecord | None = None) -> None:
        self.said.clear()
        install(self.system, owner or self.owner, force=force, say=self.said.append)

    def uninstall(self, *, purge: bool = False, force: bool = False) -> None:
        self.said.clear()
        uninstall(self.system, purge=purge, force=force, say=self.said.append)

    def files(self) -> set[str]:
        """Everything in the tree, but for what belongs to no banger."""
        own = {self.system.systemd, *self.system.systemd.parents}
        return {
            str(path.relative_to(self.system.root))
            for path in self.system.root.rglob("*")
            if path not in own
            and (path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
        }


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory that other users may enter: pytest's own are closed, and closed again at will."""
    with tempfile.TemporaryDirectory(prefix="banger-test-") as name:
        root = Path(name)
        root.chmod(0o755)
        yield root


@pytest.fixture
def host(open_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path) -> Host:
    """A host under systemd, without banger, for which releases are copied instead of built."""

    def stage(versions: Path, **_: object) -> Path:
        target = versions / os.environ.get("TEST_RELEASE", built.name)
        if not target.exists():
            versions.mkdir(parents=True, exist_ok=True)
            shutil.copytree(built, target, copy_function=os.link)
        return target

    monkeypatch.setattr(release, "stage_release", stage)
    monkeypatch.setattr(uninstaller, "release_all", lambda _: Released())
    monkeypatch.setattr(uninstaller, "_remove_network", lambda say: None)
    return Host(open_root, Systemctl(tmp_path / "systemctl", monkeypatch), built)


# --- the release ----------------------------------------------------------------------------------


def test_installed_program_runs_without_anything_around_it(built: Path) -> None:
    """No PATH, no home, no environment, and the directory of the caller does not matter."""
    done = subprocess.run(
        [built / "bin/banger", "version", "--json"], env={}, cwd="/", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"mode"' in done.stdout


def test_programs_are_isolated_from_the_callers_python(built: Path, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('somebody else')")
    done = subprocess.run(
        [built / "bin/banger", "--help"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "click.py")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_release_has_what_banger_needs_and_nothing_that_tests_it(built: Path) -> None:
    library = {path.name for path in (built / "lib").iterdir()}
    assert {"banger", "banger_root", "click", "rich", "msgspec", "cryptography"} <= library
    assert not library & {"pytest", "hypothesis", "mypy", "pip", "setuptools"}
    assert (built / "lib/banger/agent/banger-vsock-agent-amd64").stat().st_mode & 0o111
    assert (built / "lib/banger/recipes/debian-bookworm.toml").is_file()


def test_release_is_readable_by_all_and_writable_by_its_owner_only(built: Path) -> None:
    for path in [built, *built.rglob("*")]:
        mode = path.stat().st_mode
        assert mode & 0o022 == 0, path
        assert mode & 0o044 == 0o044, path


def test_helper_of_a_release_is_one_archive_that_runs_isolated(built: Path) -> None:
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", built / "banger-root.pyz", "--probe"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"version"' in done.stdout


def test_same_sources_make_the_same_release_and_change_nothing(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert release.stage_release(built.parent, interpreters=_interpreters()) == built
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_installed_program_makes_its_own_release_again(built: Path, tmp_path: Path) -> None:
    """So that `system install` may be run from /usr/local/bin too."""
    code = (
        "import sys; sys.path += [sys.argv[1]]; from pathlib import Path; "
        "from banger.system.release import stage_release; "
        "print(stage_release(Path(sys.argv[2]), interpreters=[Path('/usr/bin/python3')]).name)"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", code, built / "lib", tmp_path / "versions"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == built.name


def test_zipapp_is_the_same_whenever_and_from_wherever_it_is_made(tmp_path: Path) -> None:
    package = ROOT / "src/banger_root"
    copy = tmp_path / "elsewhere" / "banger_root"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    assert helper_archive(copy) == helper_archive(package)


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a file away")
def test_interpreter_that_others_can_change_is_refused(tmp_path: Path, built: Path) -> None:
    python = tmp_path / "python3"
    shutil.copy2("/bin/true", python)
    os.chown(python, 12345, 12345)
    with pytest.raises(BangerError) as caught:
        release.choose_interpreter([python], built / "lib")
    assert f"others than root can change {python}" in caught.value.message
    assert caught.value.reason == "unsupported"


def test_interpreter_that_cannot_load_the_packages_is_refused_with_its_words(
    tmp_path: Path,
) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(BangerError) as caught:
        release.choose_interpreter([Path("/usr/bin/python3"), Path("/none")], tmp_path / "lib")
    assert "/usr/bin/python3 cannot run it: ModuleNotFoundError" in caught.value.message
    assert "/none is not there" in caught.value.message


def test_only_the_pinned_firecracker_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    pinned, other = tmp_path / "pinned", tmp_path / "other"
    for directory, content in ((other, b"another"), (pinned, b"the one")):
        directory.mkdir()
        for name in ("firecracker", "jailer"):
            (directory / name).write_bytes(content)
    os.mkfifo(tmp_path / "firecracker")  # nobody writes: who waited would wait for ever
    digest = hashlib.sha256(b"the one").hexdigest()
    monkeypatch.setattr(release, "read_pins", lambda: {"firecracker": digest, "jailer": "0" * 64})
    assert release.find_pinned([tmp_path, other, pinned]) == {"firecracker": b"the one"}


def test_requirement_that_is_missing_is_named() -> None:
    with pytest.raises(BangerError, match="needs the Python package no-such-package"):
        requirements.find_distributions(("no-such-package>=1",))


def test_requirement_with_a_condition_or_an_extra_may_be_missing() -> None:
    found = requirements.find_distributions(
        ("no-such-package; python_version < '3'", "click", "other; extra == 'x'")
    )
    assert [d.metadata["Name"] for d in found] == ["click"]


# --- install --------------------------------------------------------------------------------------


def test_install_writes_record_units_and_links_and_starts_the_helper_first(host: Host) -> None:
    host.install()
    system = host.system
    record = read_install_record(system)
    assert record is not None
    assert (record.owner, record.uid, record.home) == (
        host.owner.owner, host.owner.uid, str(host.home),
    )  # fmt: skip
    assert (system.bin / "banger").resolve() == system.versions / host.built.name / "bin/banger"
    assert (system.bin / "bangerd").exists()
    assert host.systemctl.orders == [
        "daemon-reload",
        f"enable {HELPER_UNIT} {DAEMON_UNIT}",
        f"restart {HELPER_UNIT}",
        f"restart {DAEMON_UNIT}",
    ]
    for path in (system.record, *(system.units / unit for unit in (HELPER_UNIT, DAEMON_UNIT))):
        assert f"wrote {path}" in host.said
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(not IS_ROOT, reason="only root can give directories to the owner")
def test_directories_belong_to_whom_they_should(host: Host) -> None:
    host.install()
    system, uid = host.system, host.owner.uid
    for path, owner, mode in (
        (system.state, uid, 0o700),
        (system.cache, uid, 0o700),
        (system.helper_state, 0, 0o711),
        (system.jails, 0, 0o711),
        (system.etc, 0, 0o755),
        (system.versions, 0, 0o755),
    ):
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (owner, mode), path


def test_ssh_key_is_made_as_its_owner_and_never_replaced(host: Host) -> None:
    host.install()
    key = host.home / ".local/state/banger/ssh/id_ed25519"
    content = key.read_bytes()
    assert (key.stat().st_uid, key.stat().st_mode & 0o777) == (host.owner.uid, 0o600)
    assert b"OPENSSH PRIVATE KEY" in content
    host.install()
    assert key.read_bytes() == content


@pytest.mark.skipif(not IS_ROOT, reason="only root could write where a link leads")
def test_link_in_the_owners_home_leads_root_nowhere(host: Host, tmp_path: Path) -> None:
    """The owner puts a link where the key goes: root must not make anything behind it."""
    secret = tmp_path / "roots-own"
    secret.mkdir(mode=0o700)
    state = host.home / ".local/state/banger"
    state.mkdir(parents=True)
    (state / "ssh").symlink_to(secret)
    for path in (host.home / ".local", host.home / ".local/state", state):
        os.chown(path, host.owner.uid, host.owner.gid)
    with pytest.raises(BangerError, match="making the ssh key"):
        host.install()
    assert list(secret.iterdir()) == []
    assert not host.systemctl.orders


def test_second_install_changes_nothing_and_restarts_nothing(host: Host) -> None:
    host.install()
    before = {path: path.lstat().st_mtime_ns for path in host.system.root.rglob("*")}
    host.systemctl.forget()
    host.install()
    assert host.systemctl.orders == [f"enable {HELPER_UNIT} {DAEMON_UNIT}"]
    # The lock file alone is opened anew, which no time shows.
    assert {path: path.lstat().st_mtime_ns for path in host.system.root.rglob("*")} == before


def test_service_that_was_stopped_is_started_again(host: Host) -> None:
    host.install()
    (host.systemctl.directory / DAEMON_UNIT).unlink()
    host.install()
    assert host.systemctl.is_active(DAEMON_UNIT)


def test_upgrade_switches_the_link_and_keeps_one_release_before(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install()
    for name in ("0.2.0+aaaa", "0.3.0+bbbb"):
        monkeypatch.setenv("TEST_RELEASE", name)
        host.systemctl.forget()
        host.install()
        assert host.system.current.resolve().name == name
        assert f"restart {DAEMON_UNIT}" in host.systemctl.orders
        assert name in (host.system.units / HELPER_UNIT).read_text()
    assert host.system.previous.resolve().name == "0.2.0+aaaa"
    assert {p.name for p in host.system.versions.iterdir()} == {"0.2.0+aaaa", "0.3.0+bbbb"}


def test_upgrade_that_does_not_start_goes_back_and_restarts_what_was_there(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install()
    units = {unit: (host.system.units / unit).read_bytes() for unit in (HELPER_UNIT, DAEMON_UNIT)}
    record = host.system.record.read_bytes()
    monkeypatch.setenv("TEST_RELEASE", "0.2.0+broken")
    host.systemctl.forget()
    host.systemctl.break_unit(DAEMON_UNIT)
    with pytest.raises(BangerError) as caught:
        host.install()
    assert "Job for bangerd.service failed" in caught.value.message
    assert caught.value.hint == f"journalctl -n 50 -u {DAEMON_UNIT}"
    assert host.system.current.resolve().name == host.built.name
    assert {unit: (host.system.units / unit).read_bytes() for unit in units} == units
    assert host.system.record.read_bytes() == record
    # The fake stays broken, so this says that it was tried: after the files were back.
    orders = host.systemctl.orders
    assert orders[-3:] == [
        "daemon-reload", f"restart {HELPER_UNIT}", f"restart {DAEMON_UNIT}",
    ]  # fmt: skip


def test_first_install_that_does_not_start_leaves_no_half_installation(host: Host) -> None:
    host.systemctl.break_unit(HELPER_UNIT)
    with pytest.raises(BangerError) as caught:
        host.install()
    assert caught.value.also == ["rolled back"]
    assert not host.system.record.exists()
    assert not any((host.system.units / unit).exists() for unit in (HELPER_UNIT, DAEMON_UNIT))


def test_host_without_systemd_is_refused_with_a_way_out(host: Host) -> None:
    host.system.systemd.rmdir()
    with pytest.raises(BangerError) as caught:
        host.install()
    assert caught.value.reason == "unsupported"
    assert "BANGER_MODE=user" in (caught.value.hint or "")
    assert host.files() == set()


def test_jail_base_of_the_hosts_configuration_is_used(host: Host, tmp_path: Path) -> None:
    host.system.etc.mkdir(parents=True)
    host.system.config_file.write_text(f'jailer_chroot_base = "{tmp_path}/jails"\n')
    host.install()
    assert f"--jail-base {tmp_path}/jails " in (host.system.units / HELPER_UNIT).read_text()
    assert (tmp_path / "jails").stat().st_mode & 0o777 == 0o711


# --- the owner ------------------------------------------------------------------------------------


def test_owner_that_does_not_exist_is_named() -> None:
    with pytest.raises(BangerError, match="no such user"):
        find_owner("nobody-of-that-name")


def test_root_is_no_owner() -> None:
    with pytest.raises(BangerError, match="ordinary user"):
        find_owner("root")


def other_owner(host: Host) -> InstallRecord:
    uid = host.owner.uid + 40_000 if IS_ROOT else host.owner.uid
    return msgspec.structs.replace(host.owner, owner="other", uid=uid, gid=uid)


@pytest.mark.skipif(not IS_ROOT, reason="needs a second user")
def test_another_owner_is_refused_while_there_are_vms(host: Host) -> None:
    host.install()
    (host.system.state / "vms" / ("0" * 32)).mkdir(parents=True)
    host.systemctl.forget()
    with pytest.raises(BangerError) as caught:
        host.install(owner=other_owner(host))
    assert host.owner.owner in caught.value.message
    assert "1 VMs" in caught.value.message
    assert caught.value.hint == "sudo banger system uninstall --purge"
    assert host.systemctl.calls == []


@pytest.mark.skipif(not IS_ROOT, reason="needs a second user")
def test_another_owner_gets_everything_that_was_the_formers_and_nothing_else(
    host: Host,
) -> None:
    host.install()
    other = other_owner(host)
    home = host.root / "other-home"
    home.mkdir()
    os.chown(home, other.uid, other.gid)
    other = msgspec.structs.replace(other, home=str(home))
    vm = host.system.state / "vms" / ("0" * 32)
    vm.mkdir(parents=True)
    mine, foreign, link = vm / "overlay.ext4", vm / "roots", vm / "link"
    for path in (mine, foreign):
        path.write_text("x")
    link.symlink_to("/etc/passwd")
    for path in (vm.parent, vm, mine):
        os.chown(path, host.owner.uid, host.owner.gid)
    os.lchown(link, host.owner.uid, host.owner.gid)
    host.install(owner=other, force=True)
    assert {p.name: p.lstat().st_uid for p in (vm, mine, foreign)} == {
        vm.name: other.uid, mine.name: other.uid, foreign.name: 0,
    }  # fmt: skip
    assert Path("/etc/passwd").stat().st_uid == 0
    record = read_install_record(host.system)
    assert record is not None and record.uid == other.uid


@pytest.mark.skipif(not IS_ROOT, reason="needs a second user")
def test_another_owner_is_refused_while_vms_run_even_by_force(host: Host) -> None:
    host.install()
    host.system.ledger.mkdir(parents=True)
    (host.system.ledger / f"{'0' * 32}.json").write_text("{}")
    with pytest.raises(BangerError, match="1 of its VMs run"):
        host.install(owner=other_owner(host), force=True)


# --- uninstall ------------------------------------------------------------------------------------


def test_uninstall_without_installation_says_so(host: Host) -> None:
    with pytest.raises(BangerError, match="no system installation"):
        host.uninstall()


def test_purge_leaves_nothing_of_banger_but_the_owners_own(host: Host) -> None:
    before = host.files()
    host.install()
    (host.home / ".config/banger").mkdir(parents=True)
    (host.system.state / "banger.db").write_text("x")
    host.uninstall(purge=True)
    assert host.files() == before | {"usr/local/bin", "usr/local/lib", "etc/systemd/system",
                                     "var/lib", "var/cache"}  # fmt: skip
    assert f"kept {host.home}/.config/banger" in host.said
    assert f"kept {host.home}/.local/state/banger/ssh" in host.said
    assert (host.home / ".local/state/banger/ssh/id_ed25519").exists()
    assert f"disable {HELPER_UNIT} {DAEMON_UNIT}" in host.systemctl.orders
    assert not host.systemctl.is_active(DAEMON_UNIT)
    assert not host.systemctl.is_active(HELPER_UNIT)


def test_uninstall_keeps_vms_and_configuration_for_the_next_install(host: Host) -> None:
    host.install()
    host.system.config_file.write_text("cidr = 24\n")
    (host.system.state / "banger.db").write_text("x")
    host.uninstall()
    assert not host.system.record.exists()
    assert host.system.config_file.exists()
    assert (host.system.state / "banger.db").exists()
    assert f"kept {host.system.state}" in host.said
    host.install()
    assert (host.system.state / "banger.db").exists()


def test_uninstall_is_refused_while_vms_run(host: Host) -> None:
    host.install()
    host.system.ledger.mkdir(parents=True)
    (host.system.ledger / f"{'0' * 32}.json").write_text("{}")
    host.systemctl.forget()
    with pytest.raises(BangerError) as caught:
        host.uninstall(purge=True)
    assert caught.value.reason == "in_use"
    assert host.systemctl.calls == []
    assert host.system.record.exists()


def test_program_of_the_same_name_that_is_not_ours_stays(host: Host) -> None:
    host.install()
    link = host.system.bin / "banger"
    link.unlink()
    link.symlink_to("/opt/elsewhere/banger")
    host.uninstall()
    assert link.is_symlink()
    assert not (host.system.bin / "bangerd").is_symlink()


def test_helper_that_cannot_release_keeps_everything_unless_forced(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install()
    monkeypatch.setattr(
        uninstaller, "release_all", lambda _: Released(failures=("lease 1: it is stuck",))
    )
    with pytest.raises(BangerError, match="it is stuck"):
        host.uninstall()
    assert host.system.record.exists()
    with pytest.raises(BangerError, match="it is stuck"):
        host.uninstall(force=True)
    assert not host.system.record.exists()


def test_reading_a_damaged_record_is_an_error_and_no_traceback(host: Host) -> None:
    host.system.etc.mkdir(parents=True)
    host.system.record.write_text("owner = 1\n")
    with pytest.raises(BangerError, match="reading the install record"):
        read_install_record(host.system)


def test_nothing_is_installed_by_an_ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "banger.cli.entry", "system", "install", "--owner", "root"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True,
        **({"user": 12345, "group": 12345, "extra_groups": []} if IS_ROOT else {}),
    )  # fmt: skip
    assert done.returncode == 1
    assert "hint: sudo banger system install --owner root" in done.stderr
