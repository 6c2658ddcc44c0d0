"""Which banger a command means, and what it may do to the daemon there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from banger import __version__
from banger.api import params as p
from banger.api import results as r
from banger.api.records import ImageRecord, VmRecord
from banger.cli import build_outside
from banger.cli.server import Server
from banger.config.install import InstallRecord, format_install_record
from banger.config.paths import Paths
from banger.config.system_paths import SystemPaths
from banger.config.target import choose_paths
from banger.errors import BangerError
from fakes.daemon import running_daemon
from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def system_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BANGER_MODE", raising=False)


@pytest.fixture
def system(tmp_path: Path) -> SystemPaths:
    """A host whose banger is installed for us."""
    system = SystemPaths(root=tmp_path / "host")
    write_record(system, os.geteuid(), tmp_path / "home")
    system.runtime.mkdir(parents=True, mode=0o700)
    return system


def write_record(system: SystemPaths, uid: int, home: Path) -> None:
    record = InstallRecord(
        owner="alice", uid=uid, gid=uid, home=str(home),
        installed_at="2026-01-01T00:00:00Z", version=__version__,
    )  # fmt: skip
    system.etc.mkdir(parents=True, exist_ok=True)
    system.record.write_bytes(format_install_record(record))


# --- whose banger ---------------------------------------------------------------------------------


def test_host_without_installation_means_user_mode(tmp_path: Path) -> None:
    assert choose_paths(SystemPaths(root=tmp_path)).mode == "user"


def test_owner_of_the_installation_gets_the_hosts_banger(
    system: SystemPaths, tmp_path: Path
) -> None:
    paths = choose_paths(system)
    assert paths.mode == "system"
    assert paths.daemon_socket == system.root / "run/banger/bangerd.sock"
    assert paths.database == system.root / "var/lib/banger/banger.db"
    assert paths.config_files == (
        system.root / "etc/banger/config.toml",
        tmp_path / "home/.config/banger/config.toml",
    )
    assert paths.ssh_key == tmp_path / "home/.local/state/banger/ssh/id_ed25519"
    assert paths.known_hosts == system.root / "var/lib/banger/ssh/known_hosts"


def test_somebody_else_is_told_whose_it_is(system: SystemPaths) -> None:
    with pytest.raises(BangerError) as caught:
        choose_paths(system, uid=os.geteuid() + 1)
    assert caught.value.code == "unauthorized"
    assert "alice" in caught.value.message
    assert "BANGER_MODE=user" in caught.value.message


def test_user_mode_can_be_asked_for_by_anybody(system: SystemPaths) -> None:
    paths = choose_paths(system, uid=os.geteuid() + 1, environment={"BANGER_MODE": "user"})
    assert paths.mode == "user"


def test_other_modes_are_refused(system: SystemPaths) -> None:
    with pytest.raises(BangerError, match="BANGER_MODE is 'system'"):
        choose_paths(system, environment={"BANGER_MODE": "system"})


def test_xdg_variables_do_not_move_the_system_installation(
    system: SystemPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The service does not have them, and both sides have to mean the same files."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert choose_paths(system).config_file == tmp_path / "home/.config/banger/config.toml"


# --- the service is systemd's ---------------------------------------------------------------------


def test_service_that_does_not_run_is_never_started_from_here(
    system: SystemPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_spawn", lambda self: pytest.fail("started"))
    with pytest.raises(BangerError) as caught:
        Server(system).call("vm.list", p.Empty(), list[VmRecord])
    assert caught.value.code == "not_found"
    assert caught.value.hint == "sudo banger system restart"
    system.runtime.rmdir()
    with pytest.raises(BangerError) as caught:
        Server(system).call("vm.list", p.Empty(), list[VmRecord])
    assert caught.value.hint == "sudo systemctl start bangerd"


def test_service_of_another_version_is_not_replaced(
    system: SystemPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_spawn", lambda self: pytest.fail("started"))
    with (
        running_daemon(
            choose_paths(system).daemon_socket, {"shutdown": lambda _: pytest.fail("ended")},
            version="0.0.0-old", state=system.state,
        ),
        pytest.raises(BangerError) as caught,
    ):  # fmt: skip
        Server(system).call("vm.list", p.Empty(), list[VmRecord])
    assert caught.value.code == "bad_version"
    assert caught.value.hint == "sudo banger system restart"


def test_daemon_stop_names_system(system: SystemPaths) -> None:
    with pytest.raises(BangerError) as caught:
        Server(system).stop()
    assert caught.value.hint == "sudo banger system restart"


# --- an image that the service may not build ------------------------------------------------------


def refusal() -> BangerError:
    return BangerError("operation_failed", "not in here", reason="build_outside")


IMAGE = ImageRecord(
    id="0" * 32, name="debian", distro="debian", arch="amd64", kernel_ref="k", rootfs_path="/x",
    rootfs_sha256="0" * 64, rootfs_bytes=1, managed=True,
)  # fmt: skip


def test_refused_build_is_done_here_once_and_the_call_asked_again(
    system: SystemPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr(
        build_outside, "build_outside", lambda error, params, on_event: built.append(params)
    )

    def answer(params: p.BuildImage) -> ImageRecord:
        if not built:
            raise refusal()
        return IMAGE

    wanted = p.BuildImage(name="debian", recipe="debian-bookworm")
    with running_daemon(
        choose_paths(system).daemon_socket, {"image.build": answer}, state=system.state
    ) as daemon:
        with Server(system).stream("image.build", wanted, lambda _: None) as call:
            assert call.result(ImageRecord) == IMAGE
        assert built == [wanted]
        assert [params for _, params in daemon.asked] == [wanted, wanted]


def test_build_that_is_refused_again_is_an_error_and_no_loop(
    system: SystemPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr(build_outside, "build_outside", lambda *words: built.append(words))

    def answer(params: p.BuildImage) -> ImageRecord:
        raise refusal()

    with (
        running_daemon(
            choose_paths(system).daemon_socket, {"image.build": answer}, state=system.state
        ),
        Server(system).stream(
            "image.build", p.BuildImage(name="x", recipe="x"), lambda _: None
        ) as call,
        pytest.raises(BangerError, match="not in here"),
    ):
        call.result(ImageRecord)
    assert len(built) == 1


def test_other_failures_build_nothing(system: SystemPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_outside, "build_outside", lambda *_: pytest.fail("built"))

    def answer(params: p.BuildImage) -> ImageRecord:
        raise BangerError("operation_failed", "disk full", reason="disk_full")

    with (
        running_daemon(
            choose_paths(system).daemon_socket, {"image.build": answer}, state=system.state
        ),
        Server(system).stream(
            "image.build", p.BuildImage(name="x", recipe="x"), lambda _: None
        ) as call,
        pytest.raises(BangerError, match="disk full"),
    ):
        call.result(ImageRecord)


def _builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: object) -> Path:
    """A builder that writes these lines and notes its arguments."""
    program = tmp_path / "builder.py"
    program.write_text(
        "import json, sys\n"
        f"open({str(tmp_path / 'argv')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        f"for line in {list(lines)!r}: print(json.dumps(line), flush=True)\n"
    )
    monkeypatch.setattr(
        build_outside, "module_command", lambda module: [sys.executable, str(program)]
    )
    return tmp_path / "argv"


VM = p.CreateVm(image="debian-x", vcpu=1, memory_mib=256, disk_bytes=1, overlay_bytes=1)


@pytest.mark.parametrize(
    ("params", "recipe"),
    [(VM, "debian-x"), (p.RunVm(create=VM), "debian-x"),
     (p.BuildImage(name="mine", recipe="/r.toml"), "/r.toml")],
    ids=["create", "run", "build"],
)  # fmt: skip
def test_builder_is_told_what_the_call_needs_and_its_progress_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: object, recipe: str
) -> None:
    event = {"stage": "rootfs", "label": "building", "detail": ""}
    argv = _builder(tmp_path, monkeypatch, event, {"result": {}})
    seen: list[object] = []
    build_outside.build_outside(refusal(), params, seen.append)
    assert seen == [event]
    assert json.loads(argv.read_text())[-2:] == ["image", recipe]


def test_failure_of_the_builder_is_the_failure_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"code": "not_found", "message": "no mmdebstrap", "hint": "apt-get install mmdebstrap"}
    _builder(tmp_path, monkeypatch, {"error": error})
    with pytest.raises(BangerError) as caught:
        build_outside.build_outside(refusal(), VM, lambda _: None)
    assert (caught.value.code, caught.value.hint) == ("not_found", "apt-get install mmdebstrap")


def test_builder_that_dies_without_a_word_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _builder(tmp_path, monkeypatch)
    with pytest.raises(BangerError, match="ended with status 0"):
        build_outside.build_outside(refusal(), VM, lambda _: None)


def test_call_that_names_no_image_gives_the_daemons_own_error() -> None:
    with pytest.raises(BangerError, match="not in here"):
        build_outside.build_outside(refusal(), p.Empty(), lambda _: None)


# --- the service itself ---------------------------------------------------------------------------

_SERVICE = """
import sys
from pathlib import Path
from banger.config.system_paths import SystemPaths
from banger.daemon.main import main
root = Path(sys.argv.pop(1))
main(SystemPaths(root=root))
"""


def service(system: SystemPaths, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SERVICE, str(system.root), "--system"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_service_says_when_it_is_ready_and_when_it_stops_and_logs_json(
    system: SystemPaths, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    system.config_file.write_text('dns_listen_addr = "127.0.0.1:0"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        p1 = service(system, NOTIFY_SOCKET=str(tmp_path / "notify"), HOME=str(tmp_path / "home"))
        try:
            assert manager.recv(4096).decode().splitlines()[0] == "READY=1"
            status = Server(system).call("daemon.status", p.Empty(), r.DaemonStatus)
            assert (status.mode, status.pid) == ("system", p1.pid)
            assert "journalctl -u bangerd" in status.log
            p1.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            _, err = p1.communicate(timeout=PATIENCE_S)
            assert p1.returncode == 0, err
        finally:
            p1.kill()
            p1.wait()
    for line in err.splitlines():
        priority, _, document = line.partition(">")
        assert priority in ("<7", "<6", "<4", "<3"), line
        assert json.loads(document)["message"]


def test_service_runs_as_its_owner_only(system: SystemPaths, tmp_path: Path) -> None:
    write_record(system, os.geteuid() + 1, tmp_path / "home")
    _, err = (p1 := service(system)).communicate(timeout=PATIENCE_S)
    assert p1.returncode == 1
    assert "does not run as uid" in err


def test_service_without_installation_says_what_to_do(tmp_path: Path) -> None:
    _, err = (p1 := service(SystemPaths(root=tmp_path))).communicate(timeout=PATIENCE_S)
    assert p1.returncode == 1
    assert "hint: sudo banger system install --owner $USER" in err


def test_programs_directory_is_the_releases_own(system: SystemPaths) -> None:
    """Not the link to it: whoever runs a program as root follows none."""
    libexec = system.versions / "1.0+a/libexec"
    libexec.mkdir(parents=True)
    system.current.symlink_to("versions/1.0+a")
    assert choose_paths(system).bin == system.state / "bin"
    (libexec / "firecracker").touch()
    assert choose_paths(system).bin == libexec
    assert Paths.user_mode(system).bin != libexec
