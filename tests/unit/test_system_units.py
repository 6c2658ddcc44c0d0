"""Both units as systemd itself reads and judges them; nothing is started."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT, SystemPaths
from banger.errors import BangerError
from banger.system.installer import build_record
from banger.system.units import build_units

ROOT = Path(__file__).parents[2]
_JUDGE = shutil.which("systemd-analyze")
# systemd's exposure level in tenths. Its versions differ by some tenths in what they ask for.
_MOST = {DAEMON_UNIT: 30, HELPER_UNIT: 50}
_OWNER = 1000

needs_judge = pytest.mark.skipif(_JUDGE is None, reason="systemd-analyze is not installed")


@pytest.fixture
def units(tmp_path: Path) -> dict[str, Path]:
    """Both units in files, with programs that exist."""
    release = tmp_path / "versions/0.1.0+abc"
    (release / "bin").mkdir(parents=True)
    for name in ("bin/bangerd", "banger-root.pyz"):
        shutil.copy2("/bin/true", release / name)
    system = SystemPaths(root=tmp_path)
    record = msgspec.structs.replace(
        build_record(pwd.getpwuid(os.geteuid())), uid=_OWNER, gid=_OWNER
    )
    files = {}
    for path, content in build_units(system, record, release, system.jails).items():
        files[path.name] = tmp_path / path.name
        files[path.name].write_bytes(content)
    return files


def settings(path: Path) -> dict[str, list[str]]:
    """Every assignment of a unit, in order, by its name."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@needs_judge
@pytest.mark.parametrize("unit", [DAEMON_UNIT, HELPER_UNIT])
def test_systemd_finds_nothing_wrong_with_the_unit(units: dict[str, Path], unit: str) -> None:
    assert _JUDGE
    done = subprocess.run(
        [_JUDGE, "verify", "--man=no", units[unit]], capture_output=True, text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units[unit].parent}:"},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if unit in line]
    assert ours == []


@needs_judge
@pytest.mark.parametrize("unit", [DAEMON_UNIT, HELPER_UNIT])
def test_systemd_judges_the_unit_well_confined(units: dict[str, Path], unit: str) -> None:
    assert _JUDGE
    done = subprocess.run(
        [_JUDGE, "security", "--offline=true", "--no-pager", f"--threshold={_MOST[unit]}",
         units[unit]],
        capture_output=True, text=True,
    )  # fmt: skip
    judged = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert judged, done.stdout + done.stderr
    assert float(judged[1]) * 10 <= _MOST[unit], done.stdout


def test_services_leave_machines_and_their_sockets_alone(units: dict[str, Path]) -> None:
    """A restart signals one process, and the directory with the sockets outlives it."""
    daemon, helper = settings(units[DAEMON_UNIT]), settings(units[HELPER_UNIT])
    assert daemon["KillMode"] == ["process"]
    assert daemon["RuntimeDirectoryPreserve"] == helper["RuntimeDirectoryPreserve"] == ["yes"]
    assert "Requires" not in daemon and "BindsTo" not in daemon


def test_daemon_has_no_privilege_at_all(units: dict[str, Path]) -> None:
    daemon = settings(units[DAEMON_UNIT])
    assert daemon["CapabilityBoundingSet"] == [""]
    assert daemon["AmbientCapabilities"] == [""]
    assert daemon["NoNewPrivileges"] == ["yes"]
    assert daemon["User"] == [str(_OWNER)]


def test_every_capability_of_the_helper_has_its_reason_beside_it(units: dict[str, Path]) -> None:
    (line,) = settings(units[HELPER_UNIT])["CapabilityBoundingSet"]
    reasons = "\n".join(
        text for text in units[HELPER_UNIT].read_text().splitlines() if text.startswith("#")
    )
    for capability in line.split():
        assert re.search(rf"\b{capability.removeprefix('CAP_')}\b", reasons), capability


def test_helper_understands_the_command_line_of_its_unit(units: dict[str, Path]) -> None:
    """Its own parser is the judge: an option that it does not know ends it with status 2."""
    (line,) = settings(units[HELPER_UNIT])["ExecStart"]
    words = shlex.split(line)
    assert words[:4] == ["/usr/bin/python3", "-I", "-S", "-B"]
    done = subprocess.run(
        [*words[:4], ROOT / "src/banger_root", *words[5:], "--probe"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_path_that_a_unit_cannot_name_is_refused(tmp_path: Path) -> None:
    record = build_record(pwd.getpwuid(os.geteuid()))
    with pytest.raises(BangerError, match="characters that systemd"):
        build_units(SystemPaths(), record, tmp_path, Path("/jails with %n"))


def test_name_of_the_owner_cannot_add_to_a_unit() -> None:
    record = msgspec.structs.replace(
        build_record(pwd.getpwuid(os.geteuid())), owner="x\nExecStartPre=/bin/evil %n \\"
    )
    for content in build_units(SystemPaths(), record, Path("/r"), Path("/j")).values():
        assert b"\nExecStartPre" not in content
        assert b"%n" not in content
