"""The probe's child process: its deadline, its death, its words; and what doctor makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from banger.vmm import tsc, vcpu
from banger.vmm.kvm_probe import (
    KvmKind,
    KvmResult,
    describe_kvm,
    explain_kvm,
    measure_tsc,
    probe_kvm,
)


def _program(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "child.py"
    path.write_text(f"import os, sys, json, time, signal\n{body}\n")
    return path


def _step(name: str) -> str:
    return f"print(json.dumps({{'step': {name!r}}}), flush=True)\n"


def test_an_absent_device_is_absent(tmp_path: Path) -> None:
    result = probe_kvm(tmp_path / "kvm")
    assert result.kind == "absent"
    assert str(tmp_path / "kvm") in result.detail


def test_a_file_that_is_no_kvm_device_dies(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    result = probe_kvm(tmp_path / "kvm")
    assert result.kind == "dies"
    assert "KVM_GET_API_VERSION" in result.detail


def test_a_device_that_may_not_be_opened_is_denied(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open every file")
    (tmp_path / "kvm").touch(mode=0)
    assert probe_kvm(tmp_path / "kvm").kind == "denied"


def test_a_probe_that_hangs_is_ended_and_says_how_far_it_came(tmp_path: Path) -> None:
    child = _program(tmp_path, _step("one") + _step("two") + "time.sleep(3600)")
    # How far it comes in a second is a matter of how busy the machine is.
    for deadline_s in (1, 5, 25, 125):
        result = probe_kvm(program=child, deadline_s=deadline_s)
        assert result.kind == "hangs"
        assert result.steps == ("one", "two")[: len(result.steps)]
        if len(result.steps) == 2:
            return
    raise AssertionError("it was ended before its second step, however long that took")


def test_a_probe_that_is_killed_says_by_what(tmp_path: Path) -> None:
    child = _program(tmp_path, _step("one") + "os.kill(os.getpid(), signal.SIGSEGV)")
    result = probe_kvm(program=child)
    assert (result.kind, result.steps) == ("crashed", ("one",))
    assert "SIGSEGV" in result.detail


def test_a_probe_that_raises_gives_its_last_line(tmp_path: Path) -> None:
    result = probe_kvm(program=_program(tmp_path, "raise MemoryError('no pages')"))
    assert result.kind == "crashed"
    assert "MemoryError: no pages" in result.detail


@pytest.mark.parametrize(
    "last", ["{", '{"outcome": "splendid", "detail": ""}', '"outcome"', "[]", "usable"]
)
def test_a_last_line_that_is_no_outcome_is_no_success(tmp_path: Path, last: str) -> None:
    result = probe_kvm(program=_program(tmp_path, f"print({last!r})"))
    assert result.kind == "crashed"


def test_the_program_needs_nothing_but_the_standard_library() -> None:
    for module in (vcpu, tsc):
        assert module.__file__
        code = (
            "import sys, runpy; runpy.run_path(sys.argv[1]); "
            "bad = [m for m in sys.modules if m.partition('.')[0] in ('banger', 'msgspec')]; "
            "sys.exit(repr(bad) if bad else 0)"
        )
        subprocess.run([sys.executable, "-I", "-S", "-c", code, module.__file__], check=True)


@pytest.mark.parametrize("kind", [k for k in get_args(KvmKind) if k != "usable"])
def test_every_failure_is_explained_with_its_detail(kind: KvmKind) -> None:
    problem = explain_kvm(KvmResult(kind=kind, detail="what was seen"))
    assert problem is not None
    assert "what was seen" in problem.message


def test_a_usable_kvm_is_no_problem() -> None:
    assert explain_kvm(KvmResult(kind="usable", detail="")) is None


def test_a_denied_device_names_the_command_that_lets_the_user_in(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o600)
    problem = explain_kvm(KvmResult(kind="denied", detail="x"), device)
    assert problem is not None and problem.hint is not None
    assert problem.hint.startswith("sudo setfacl -m u:")
    assert problem.hint.endswith(str(device))


def test_a_device_open_to_its_group_names_the_group(tmp_path: Path) -> None:
    import grp

    gid = next((g for g in (os.getgid(), *os.getgroups(), 106, 12) if g != 0), 0)
    if os.geteuid() != 0 and gid == 0:
        pytest.skip("this user has no group but root's")
    try:
        name = grp.getgrgid(gid).gr_name
    except KeyError:
        pytest.skip(f"group {gid} has no name here")
    device = tmp_path / "kvm"
    device.touch()
    os.chown(device, -1, gid)
    device.chmod(0o660)
    problem = explain_kvm(KvmResult(kind="denied", detail="x"), device)
    assert problem is not None and problem.hint is not None
    assert f"usermod -aG {name} " in problem.hint


def test_evidence_names_every_step_that_passed() -> None:
    result = KvmResult(kind="dies", detail="gone", steps=("one", "two"))
    assert describe_kvm(result)[1:] == ("vCPU passed: one", "vCPU passed: two", "gone")


def test_the_counter_of_an_x86_host_can_be_measured() -> None:
    khz = measure_tsc()
    if khz is None:
        pytest.skip("this host's time stamp counter cannot be measured")
    assert 100_000 < khz < 10_000_000


def test_this_host_gets_one_clear_answer() -> None:
    result = probe_kvm()
    assert result.kind in ("usable", "absent", "denied", "busy", "no_long_mode", "dies")
    assert result.detail
