"""The set-up's own pieces: plans, scripts, packages, the fetched programs, the helper's archive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import host_packages, package, setup
from tools.host_packages import Need
from tools.steps import ROOT, StepFailed


def test_every_group_names_known_steps() -> None:
    for group in setup.GROUPS:
        assert setup.plan([group])


def test_a_plan_is_in_the_order_of_dependence() -> None:
    names = [step.name for step in setup.plan(["demo"])]
    assert names[:2] == ["host", "venv"]
    assert names.index("agent") < names.index(f"kernel-{setup.KERNEL}")
    assert names[-1] == f"image-{setup.IMAGE}"


def test_an_unknown_step_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StepFailed, match="unknown step nonsense; there are: host, "):
        setup.plan(["nonsense"])


def test_the_version_is_the_packages() -> None:
    from banger import __version__

    assert setup.project_version() == __version__


@pytest.fixture
def fake_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's shape, in a directory that may have blanks in its name."""
    venv = tmp_path / "with a blank" / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(setup, "VENV", venv)
    monkeypatch.setattr(setup, "PYTHON", venv / "bin" / "python")
    return venv


def test_a_script_starts_from_a_directory_with_a_blank(fake_venv: Path) -> None:
    module = fake_venv / "lib" / "python3.11" / "site-packages" / "there.py"
    module.write_text("import sys\ndef main():\n    print(sys.argv[1:])\n    return 7\n")
    script = fake_venv / "bin" / "there"
    script.write_text(setup.script_text("there"))
    script.chmod(0o755)
    done = subprocess.run([script, "a b", "c"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("['a b', 'c']\n", 7)


def test_an_environment_of_a_replaced_python_does_not_fit(fake_venv: Path) -> None:
    python = fake_venv / "bin" / "python"
    python.unlink()
    other = fake_venv / "python3.99"
    other.touch()
    python.symlink_to(other)
    assert not setup._fits_its_python()


def test_missing_programs_are_found_missing() -> None:
    there = Need("sh", "dash", "bash", "bash")
    module = Need("python:json", "python3", "python3", "python")
    file = Need("/etc/passwd", "base-files", "setup", "filesystem")
    gone = Need("no-such-program", "nothing", "nothing", "nothing")
    assert host_packages.missing([there, module, file, gone]) == [gone]


def test_an_unknown_distribution_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_packages, "_manager", lambda: None)
    with pytest.raises(StepFailed, match=r"by hand.*: no-such-program$"):
        host_packages.install([Need("no-such-program", "x", "x", "x")], log="none")


def test_without_root_the_command_to_run_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(host_packages, "_manager", lambda: "apt-get")
    monkeypatch.setenv("PATH", str(tmp_path))  # no sudo
    with pytest.raises(StepFailed, match="sudo apt-get install some-package"):
        host_packages.install([Need("no-such-program", "some-package", "x", "x")], log="none")


def test_the_helpers_archive_is_the_same_twice() -> None:
    sources = ROOT / "src" / "banger_root"
    assert package.helper_archive(sources) == package.helper_archive(sources)


def test_the_helpers_archive_runs(tmp_path: Path) -> None:
    archive = tmp_path / "banger-root"
    archive.write_bytes(package.helper_archive(ROOT / "src" / "banger_root"))
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", archive], capture_output=True, text=True, check=False
    )
    assert "--owner-uid" in done.stderr
