"""Finding Firecracker and QEMU, and judging what they say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.vmm.kvm_probe import Problem
from banger.vmm.programs import Program, check_firecracker, find_firecracker, find_qemu


def _script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only_tmp_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is one empty directory; what is looked up is found there or not at all."""
    directory = tmp_path / "path"
    directory.mkdir()
    monkeypatch.setattr(
        "banger.vmm.programs.find_program",
        lambda name: str(directory / name) if (directory / name).exists() else None,
    )
    return directory


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("1.9.1", False),
        ("1.9.99", False),
        ("0.25.2", False),
        ("1.10.0", True),
        ("1.10.1", True),
        ("1.12.1", True),
        ("2.0.0", True),
    ],
)
def test_firecracker_is_accepted_from_1_10_0_on(version: str, accepted: bool) -> None:
    result = check_firecracker(Path("/f"), f"Firecracker v{version}\n\nexit_code=0\n")
    assert isinstance(result, Program) is accepted
    assert version in (result.version if isinstance(result, Program) else result.message)


@pytest.mark.parametrize(("version", "remarked"), [("1.12.1", False), ("1.12.2", True)])
def test_a_version_newer_than_the_tested_one_is_remarked(version: str, remarked: bool) -> None:
    result = check_firecracker(Path("/f"), f"Firecracker v{version}")
    assert isinstance(result, Program)
    assert (result.remark is not None) is remarked


@pytest.mark.parametrize("said", ["", "jailer v1.12.1", "Firecracker v1", "\0\1"])
def test_output_that_is_no_version_is_a_problem(said: str) -> None:
    assert isinstance(check_firecracker(Path("/f"), said), Problem)


def test_the_setting_goes_before_path_and_fetched_programs(
    tmp_path: Path, only_tmp_on_path: Path
) -> None:
    configured = _script(tmp_path / "mine", "echo Firecracker v1.11.0")
    _script(only_tmp_on_path / "firecracker", "echo Firecracker v1.12.0")
    _script(tmp_path / "bin/firecracker", "echo Firecracker v1.12.1")
    result = find_firecracker(str(configured), tmp_path / "bin")
    assert result == Program(path=configured, version="1.11.0")


def test_path_goes_before_fetched_programs(tmp_path: Path, only_tmp_on_path: Path) -> None:
    found = _script(only_tmp_on_path / "firecracker", "echo Firecracker v1.12.0")
    _script(tmp_path / "bin/firecracker", "echo Firecracker v1.12.1")
    assert find_firecracker(None, tmp_path / "bin") == Program(path=found, version="1.12.0")


def test_a_fetched_program_is_found(tmp_path: Path, only_tmp_on_path: Path) -> None:
    fetched = _script(tmp_path / "bin/firecracker", "echo Firecracker v1.12.1")
    assert find_firecracker(None, tmp_path / "bin") == Program(path=fetched, version="1.12.1")


def test_a_missing_program_names_where_was_looked(tmp_path: Path, only_tmp_on_path: Path) -> None:
    result = find_firecracker(None, tmp_path / "bin")
    assert isinstance(result, Problem)
    assert str(tmp_path / "bin") in result.message
    assert result.hint == "banger doctor --fix"


def test_a_setting_that_leads_nowhere_is_not_replaced_in_silence(
    tmp_path: Path, only_tmp_on_path: Path
) -> None:
    _script(only_tmp_on_path / "firecracker", "echo Firecracker v1.12.1")
    result = find_firecracker(str(tmp_path / "absent"), tmp_path)
    assert isinstance(result, Problem)
    assert "firecracker_bin" in result.message


def test_a_program_that_fails_is_a_problem_with_its_words(tmp_path: Path) -> None:
    broken = _script(tmp_path / "firecracker", "echo cannot map memory >&2; exit 3")
    result = find_firecracker(str(broken), tmp_path)
    assert isinstance(result, Problem)
    assert "cannot map memory" in result.message


QMP = '{"QMP": {}}'
VERSION = '{"return": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": ""}}'
MACHINES = '{"return": [{"name": "none"}, {"name": "microvm"}]}'


def _qemu(directory: Path, *lines: str, before: str = "") -> Path:
    says = "\n".join(f"echo '{line}'" for line in lines)
    return _script(directory / "qemu-system-x86_64", f"{before}\ncat >/dev/null\n{says}")


def test_qemu_tells_version_and_filter(only_tmp_on_path: Path) -> None:
    program = _qemu(only_tmp_on_path, QMP, '{"return": {}}', VERSION, MACHINES)
    assert find_qemu() == Program(path=program, version="9.1.2", sandbox=True)


def test_a_qemu_built_without_seccomp_is_used_without(only_tmp_on_path: Path) -> None:
    program = _qemu(
        only_tmp_on_path,
        VERSION,
        MACHINES,
        before='case "$*" in *-sandbox*) echo no seccomp >&2; exit 1;; esac',
    )
    assert find_qemu() == Program(path=program, version="9.1.2", sandbox=False)


def test_a_qemu_without_microvm_is_a_problem(only_tmp_on_path: Path) -> None:
    _qemu(only_tmp_on_path, VERSION, '{"return": [{"name": "pc"}]}')
    result = find_qemu()
    assert isinstance(result, Problem)
    assert "microvm" in result.message


@pytest.mark.parametrize("line", ["", "hello", "[]", '{"return": {}}'])
def test_a_qemu_that_says_something_else_is_a_problem(only_tmp_on_path: Path, line: str) -> None:
    _qemu(only_tmp_on_path, line)
    assert isinstance(find_qemu(), Problem)


def test_a_missing_qemu_names_the_package(only_tmp_on_path: Path) -> None:
    result = find_qemu()
    assert isinstance(result, Problem)
    assert result.hint is not None and "qemu-system-x86" in result.hint
