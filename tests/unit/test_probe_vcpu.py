"""The vCPU's program and every way in which a KVM device can fail it."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from banger.vmm import vcpu
from fakes.kvm import (
    HALT,
    RIGHT_VALUE,
    Exit,
    FakeKvm,
    emulation_failure,
    healthy,
    out,
    steps,
    value,
)


def test_a_kvm_that_runs_every_step_is_usable() -> None:
    outcome = vcpu.run_vcpu(FakeKvm())
    assert outcome.kind == "usable"
    assert outcome.steps == vcpu.STEPS


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, "absent"),
        (errno.ENODEV, "absent"),
        (errno.ENXIO, "absent"),
        (errno.EACCES, "denied"),
        (errno.EPERM, "denied"),
        (errno.EBUSY, "busy"),
        (errno.EIO, "dies"),
    ],
)
def test_a_device_that_does_not_open_is_told_apart_by_errno(number: int, kind: str) -> None:
    outcome = vcpu.run_vcpu(FakeKvm(open_errno=number), "/dev/elsewhere")
    assert outcome.kind == kind
    assert "/dev/elsewhere" in outcome.detail


def test_a_processor_held_by_another_hypervisor_is_busy() -> None:
    outcome = vcpu.run_vcpu(FakeKvm(fails={vcpu.KVM_CREATE_VM: errno.EBUSY}))
    assert outcome.kind == "busy"
    assert "KVM_CREATE_VM" in outcome.detail


def test_a_device_that_is_no_kvm_dies_with_the_ioctl_named() -> None:
    outcome = vcpu.run_vcpu(FakeKvm(fails={vcpu.KVM_GET_API_VERSION: errno.ENOTTY}))
    assert (outcome.kind, outcome.steps) == ("dies", ())
    assert "KVM_GET_API_VERSION" in outcome.detail


def test_a_vcpu_that_cannot_be_entered_dies_at_its_first_step() -> None:
    outcome = vcpu.run_vcpu(FakeKvm(fails={vcpu.KVM_RUN: errno.EFAULT}))
    assert outcome.kind == "dies"
    assert f"step 1 of {len(vcpu.STEPS)}" in outcome.detail


def test_another_api_version_is_wrong() -> None:
    assert vcpu.run_vcpu(FakeKvm(api_version=11)).kind == "wrong"


def test_a_kvm_without_64_bit_guests_is_told_apart() -> None:
    assert vcpu.run_vcpu(FakeKvm(long_mode=False)).kind == "no_long_mode"


def test_a_guest_that_dies_early_names_step_and_instruction() -> None:
    script = [*steps(7), emulation_failure(bytes.fromhex("f0480fc70f"))]
    outcome = vcpu.run_vcpu(FakeKvm(script=script))
    assert outcome.kind == "dies"
    assert outcome.steps == vcpu.STEPS[:7]
    assert "f0 48 0f c7 0f" in outcome.detail
    assert vcpu.STEPS[7] in outcome.detail


@pytest.mark.parametrize("reached", range(len(vcpu.STEPS)))
def test_a_triple_fault_at_any_step_dies_there(reached: int) -> None:
    script = [*steps(reached), Exit(vcpu.KVM_EXIT_SHUTDOWN)]
    outcome = vcpu.run_vcpu(FakeKvm(script=script))
    assert outcome.kind == "dies"
    assert vcpu.STEPS[reached] in outcome.detail


def test_a_failed_entry_shows_the_hardware_reason() -> None:
    script = [Exit(vcpu.KVM_EXIT_FAIL_ENTRY, (0x80000021).to_bytes(8, "little"))]
    assert "0x80000021" in vcpu.run_vcpu(FakeKvm(script=script)).detail


@pytest.mark.parametrize(
    "script",
    [
        [HALT],
        [*steps(), HALT],
        [*steps(), *value(RIGHT_VALUE)[:1], HALT],
    ],
    ids=["at once", "without a value", "with half a value"],
)
def test_a_halt_before_its_time_is_no_success(script: list[Exit]) -> None:
    assert vcpu.run_vcpu(FakeKvm(script=script)).kind == "dies"


@pytest.mark.parametrize(
    "script",
    [
        [out(0x10, 1, 2)],
        [*steps(3), out(0x10, 1, 3)],
        [*steps(), out(0x10, 1, len(vcpu.STEPS) + 1)],
        [out(0x14, 4, 7)],
        [out(0x80, 1, 1)],
        [out(0x10, 2, 1)],
        [Exit(vcpu.KVM_EXIT_IO, b"\0\1\x10\0\1\0\0\0" + bytes(8))],
        [Exit(vcpu.KVM_EXIT_IO, b"\1\1\x10\0\1\0\0\0" + b"\xff" * 8)],
    ],
    ids=["skipped", "repeated", "too many", "early value", "port", "size", "read", "offset"],
)
def test_an_exit_that_was_not_expected_is_wrong(script: list[Exit]) -> None:
    assert vcpu.run_vcpu(FakeKvm(script=script)).kind == "wrong"


def test_a_wrong_result_is_wrong_though_every_step_was_reported() -> None:
    script = [*steps(), *value(RIGHT_VALUE ^ 1 << 63), HALT]
    outcome = vcpu.run_vcpu(FakeKvm(script=script))
    assert outcome.kind == "wrong"
    assert outcome.steps == vcpu.STEPS


@pytest.mark.parametrize("request_name", sorted(set(vcpu.IOCTL_NAMES.values())))
def test_nothing_stays_open_whichever_call_fails(request_name: str) -> None:
    request = next(r for r, n in vcpu.IOCTL_NAMES.items() if n == request_name)
    kvm = FakeKvm(fails={request: errno.EINVAL})
    assert vcpu.run_vcpu(kvm).kind == "dies"
    assert kvm.open_fds == set()


def test_nothing_stays_open_after_a_good_run() -> None:
    kvm = FakeKvm(script=healthy())
    vcpu.run_vcpu(kvm)
    assert kvm.open_fds == set()


@pytest.mark.parametrize(
    ("bits", "listing"),
    [
        *((32, code) for _, code in vcpu.PROTECTED),
        (32, vcpu.FAR_RETURN),
        *((64, code) for _, code in vcpu.LONG),
        (64, vcpu.REPORT_VALUE),
        (64, vcpu.SKIP_UD2),
    ],
)
def test_the_machine_code_is_what_its_source_says(
    bits: int, listing: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    if not (shutil.which("as") and shutil.which("objcopy")):
        pytest.skip("binutils (as, objcopy) are not installed")
    source = "\n".join([".intel_syntax noprefix", f".code{bits}", *(s for _, s in listing)]) + "\n"
    subprocess.run(["as", "-o", "a.o"], input=source.encode(), cwd=tmp_path, check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", "a.o", "a.bin"], cwd=tmp_path, check=True
    )
    assert vcpu.assemble(listing) == (tmp_path / "a.bin").read_bytes()


def test_the_program_fits_between_the_tables() -> None:
    memory = vcpu.build_memory()
    assert len(memory) == 2 << 20
    # The 32-bit part ends before the 64-bit part begins, and that before the handler.
    assert memory[0x10F00:0x11000] == bytes(0x100)
    assert memory[0x11F00:0x12000] == bytes(0x100)
