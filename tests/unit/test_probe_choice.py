"""Which driver a host gets: every mix of KVM, Firecracker, QEMU, setting and network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest

from banger.errors import BangerError
from banger.vmm.kvm_probe import KvmKind, KvmResult, Problem
from banger.vmm.probe import Verdict, choose_driver, judge, probe
from banger.vmm.programs import Program
from banger.vmm.qemu import QemuDriver

Setting = Literal["auto", "firecracker", "qemu"]
FIRECRACKER = Program(path=Path("/opt/firecracker"), version="1.12.1")
QEMU = Program(path=Path("/usr/bin/qemu-system-x86_64"), version="7.2.0")
NO_FIRECRACKER = Problem(about="firecracker", message="no firecracker", hint="fetch it")
NO_QEMU = Problem(about="qemu", message="no qemu", hint="install it")


def verdict(
    *,
    kvm: KvmKind = "usable",
    firecracker: Program | Problem = FIRECRACKER,
    qemu: Program | Problem = QEMU,
    tsc_khz: int | None = 2_600_000,
    vhost_vsock: bool = False,
) -> Verdict:
    return judge(
        kvm=KvmResult(kind=kvm, detail="what was seen"),
        firecracker=firecracker,
        qemu=qemu,
        vhost_vsock=vhost_vsock,
        tsc_khz=tsc_khz,
    )


@pytest.mark.parametrize(
    ("setting", "kvm", "firecracker", "qemu", "network", "expected"),
    [
        ("auto", True, True, True, "bridge", "firecracker"),
        ("auto", True, True, False, "bridge", "firecracker"),
        ("auto", True, False, True, "bridge", "qemu kvm"),
        ("auto", False, True, True, "bridge", "qemu tcg"),
        ("auto", False, True, False, "bridge", None),
        ("auto", True, False, False, "bridge", None),
        ("auto", True, True, True, "user", "qemu kvm"),
        ("auto", False, True, True, "user", "qemu tcg"),
        ("auto", True, True, False, "user", None),
        ("firecracker", True, True, True, "bridge", "firecracker"),
        ("firecracker", False, True, True, "bridge", None),
        ("firecracker", True, False, True, "bridge", None),
        ("firecracker", True, True, True, "user", None),
        ("qemu", True, True, True, "bridge", "qemu kvm"),
        ("qemu", False, False, True, "bridge", "qemu tcg"),
        ("qemu", True, True, False, "bridge", None),
        ("qemu", False, False, True, "user", "qemu tcg"),
    ],
)
def test_the_driver_follows_setting_host_and_network(
    setting: Setting,
    kvm: bool,
    firecracker: bool,
    qemu: bool,
    network: Literal["bridge", "user"],
    expected: str | None,
) -> None:
    found = verdict(
        kvm="usable" if kvm else "dies",
        firecracker=FIRECRACKER if firecracker else NO_FIRECRACKER,
        qemu=QEMU if qemu else NO_QEMU,
    )
    if expected is None:
        with pytest.raises(BangerError) as failed:
            choose_driver(setting, found, network=network)
        assert failed.value.reason == "unsupported"
        assert failed.value.hint
        return
    chosen = choose_driver(setting, found, network=network)
    name = f"qemu {chosen.accel}" if isinstance(chosen, QemuDriver) else chosen.name
    assert name == expected


def test_a_refused_firecracker_says_what_the_vcpu_did() -> None:
    with pytest.raises(BangerError) as failed:
        choose_driver("firecracker", verdict(kvm="dies"))
    assert "what was seen" in failed.value.message


def test_a_missing_firecracker_names_the_command_that_fetches_it() -> None:
    with pytest.raises(BangerError) as failed:
        choose_driver("firecracker", verdict(firecracker=NO_FIRECRACKER))
    assert failed.value.hint == "fetch it"


def test_a_host_with_nothing_lists_everything_and_hints_at_the_cheapest() -> None:
    nothing = verdict(kvm="absent", firecracker=NO_FIRECRACKER, qemu=NO_QEMU)
    with pytest.raises(BangerError) as failed:
        choose_driver("auto", nothing)
    for word in ("KVM", "no firecracker", "no qemu"):
        assert word in failed.value.message
    assert failed.value.hint == "install it"


def test_user_networking_does_not_complain_of_kvm() -> None:
    with pytest.raises(BangerError) as failed:
        choose_driver("auto", verdict(kvm="dies", qemu=NO_QEMU), network="user")
    assert "no qemu" in failed.value.message
    assert "what was seen" not in failed.value.message


@pytest.mark.parametrize("kind", [k for k in get_args(KvmKind) if k != "usable"])
def test_no_kvm_that_failed_is_ever_used(kind: KvmKind) -> None:
    found = verdict(kvm=kind)
    assert (found.driver, found.accel, found.kvm_usable) == ("qemu", "tcg", False)
    assert [p.about for p in found.problems] == ["kvm"]


def test_a_healthy_host_has_evidence_and_no_problem() -> None:
    found = verdict()
    assert found.problems == ()
    assert "what was seen" in found.evidence
    assert "firecracker 1.12.1 at /opt/firecracker" in found.evidence


def test_the_driver_knows_what_the_probe_measured() -> None:
    chosen = choose_driver("qemu", verdict(kvm="absent", tsc_khz=3_000_000, vhost_vsock=True))
    assert isinstance(chosen, QemuDriver)
    assert chosen.tsc_khz == 3_000_000
    assert chosen.capabilities.vsock == "host"
    assert chosen.capabilities.emulated


def test_an_unmeasured_counter_is_part_of_the_evidence() -> None:
    assert "time stamp counter" in verdict(kvm="absent", tsc_khz=None).evidence[-1]


def test_this_host_can_be_judged(tmp_path: Path) -> None:
    found = probe(bin_directory=tmp_path, device=tmp_path / "kvm")
    assert found.kvm_kind == "absent"
    assert found.driver in ("qemu", None)
    assert (found.driver is None) == (found.qemu is None)
