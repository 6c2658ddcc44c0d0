"""What a machine may be, and the kernel's command line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from banger.vmm.machine import TapNic, UserNic, build_kernel_args
from fakes.vmm import MAC, TAP, make_machine


@pytest.mark.parametrize(
    "change",
    [
        {"vm_id": "web"},
        {"vm_id": "0123456789ABCDEF0123456789abcdef"},
        {"vcpu": 0},
        {"vcpu": 33},
        {"memory_mib": 127},
        {"vsock_cid": 2},
        {"vsock_cid": 0xFFFFFFFF},
        {"kernel": Path("vmlinux")},
        {"runtime": Path("run")},
        {"initrd": Path("/a\0b")},
        {"drives": ()},
        {"drives": make_machine().drives[::-1]},
        {"drives": make_machine().drives[:2]},
    ],
    ids=repr,
)
def test_a_machine_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    fields = {f: getattr(make_machine(), f) for f in make_machine().__struct_fields__}
    with pytest.raises(ValueError):
        type(make_machine())(**(fields | change))


def test_a_machine_without_a_modules_disk_is_allowed() -> None:
    assert [d.role for d in make_machine(modules=False).drives] == ["image", "overlay", "work"]


@pytest.mark.parametrize("tap", ["", "x" * 16, "tap,script=/bin/sh", "-tap", "a/b", "tap 1"])
def test_a_tap_name_that_is_none_is_refused(tap: str) -> None:
    with pytest.raises(ValueError, match="interface name"):
        TapNic(tap=tap, mac=MAC)


@pytest.mark.parametrize("mac", ["", "06:00:AC:10:00:02", "06-00-ac-10-00-02", MAC + ",x=y"])
def test_a_mac_that_is_none_is_refused(mac: str) -> None:
    with pytest.raises(ValueError, match="MAC"):
        TapNic(tap="tap0", mac=mac)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_an_agent_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="agent_port"):
        UserNic(mac=MAC, agent_port=port, announce_socket=Path("/a"))


def test_the_command_line_is_base_then_driver_then_caller() -> None:
    machine = make_machine(kernel_args_extra="debug nopti")
    assert build_kernel_args(machine, "pci=off", reboot="keyboard") == (
        "console=ttyS0 reboot=k panic=-1 quiet rdinit=/init pci=off debug nopti"
    )


def test_the_command_line_names_no_root_and_no_address() -> None:
    words = build_kernel_args(make_machine(), reboot="acpi").split()
    assert not [w for w in words if w.startswith(("root=", "ip="))]


@pytest.mark.parametrize("extra", ["a\nb", "naïve", "\x1b[2J", "x" * 2048])
def test_arguments_that_a_kernel_does_not_read_whole_are_refused(extra: str) -> None:
    with pytest.raises(ValueError, match="kernel arguments"):
        build_kernel_args(make_machine(kernel_args_extra=extra), reboot="acpi")


def test_a_machine_is_a_value() -> None:
    assert make_machine() == make_machine()
    assert msgspec.structs.replace(TAP, tap="tap1") != TAP
