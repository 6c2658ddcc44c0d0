"""The command line that the qemu driver builds, and its talk with QEMU's monitor."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.vmm.machine import Machine
from banger.vmm.qemu import QemuDriver, escape
from fakes.vmm import TAP, USER, VM_ID, listening, make_machine
from patience import PATIENCE_S

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


def driver(
    *,
    accel: Literal["kvm", "tcg"] = "tcg",
    sandbox: bool = True,
    vhost_vsock: bool = False,
    tsc_khz: int | None = 2_600_000,
) -> QemuDriver:
    return QemuDriver(
        program=Path("/usr/bin/qemu-system-x86_64"),
        version="7.2.0",
        accel=accel,
        sandbox=sandbox,
        vhost_vsock=vhost_vsock,
        tsc_khz=tsc_khz,
    )


def options(argv: tuple[str, ...], name: str) -> list[str]:
    """The values of every option of this name."""
    return [argv[i + 1] for i, word in enumerate(argv) if word == name]


def test_an_emulated_machine_on_a_tap() -> None:
    launch = driver().build_launch(make_machine())
    assert launch.cwd == make_machine().runtime
    blockdev = (
        "discard=unmap,cache.direct=off,cache.no-flush=off,file.driver=file,file.filename={path},"
        "file.locking={lock},file.aio=threads,file.discard=unmap,"
        "file.cache.direct=off,file.cache.no-flush=off"
    )

    def drive(role: str, *, read_only: bool) -> list[str]:
        ro, lock = ("on", "off") if read_only else ("off", "auto")
        path = f"/state/{role}.disk"
        return [
            "-blockdev",
            f"driver=raw,node-name={role},read-only={ro},auto-read-only=off,"
            + blockdev.format(path=path, lock=lock),
            "-device",
            f"virtio-blk-device,drive={role}",
        ]

    assert list(launch.argv) == [
        "/usr/bin/qemu-system-x86_64",
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-name", f"guest=banger-{VM_ID}"),
        *("-M", "microvm,acpi=on,rtc=on,isa-serial=on,pit=off,pic=off"),
        *("-accel", "tcg,thread=single,tb-size=128", "-cpu", "max", "-smp", "2", "-m", "512M"),
        *("-kernel", "/state/vmlinux", "-initrd", "/state/initrd.img"),
        "-append",
        "console=ttyS0 reboot=a panic=-1 quiet rdinit=/init "
        "tsc_early_khz=2600000 tsc=reliable no_timer_check cryptomgr.notests",
        *("-chardev", "socket,id=monitor,path=api.sock,server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-device", "virtio-rng-device"),
        *drive("image", read_only=True),
        *drive("overlay", read_only=False),
        *drive("work", read_only=False),
        *drive("modules", read_only=True),
        *("-netdev", f"tap,id=net0,ifname={TAP.tap},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-device,netdev=net0,mac={TAP.mac}"),
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]


def test_kvm_needs_no_help_with_time() -> None:
    argv = driver(accel="kvm").build_launch(make_machine()).argv
    assert options(argv, "-accel") == ["kvm"]
    assert options(argv, "-cpu") == ["host"]
    assert "tsc" not in options(argv, "-append")[0]


def test_a_counter_that_was_not_measured_leaves_the_legacy_timer() -> None:
    argv = driver(tsc_khz=None).build_launch(make_machine()).argv
    assert "pit=on,pic=on" in options(argv, "-M")[0]
    assert "tsc" not in options(argv, "-append")[0]


def test_user_networking_lets_nothing_out_but_the_announcement() -> None:
    argv = driver().build_launch(make_machine(nic=USER)).argv
    [netdev] = options(argv, "-netdev")
    fields = netdev.split(",")
    assert fields[0] == "user"
    assert "restrict=on" in fields
    assert "hostfwd=tcp:127.0.0.1:40001-10.0.2.15:7000" in fields
    assert "guestfwd=tcp:10.0.2.100:7001-chardev:announce" in fields
    assert "socket,id=announce,path=/run/banger/announce.sock,server=off,reconnect=1" in argv


def test_user_networking_with_nat_lets_the_guest_out() -> None:
    nic = type(USER)(mac=USER.mac, agent_port=1, announce_socket=USER.announce_socket, nat=True)
    [netdev] = options(driver().build_launch(make_machine(nic=nic)).argv, "-netdev")
    assert "restrict=off" in netdev.split(",")


def test_a_machine_without_a_card_has_no_netdev() -> None:
    argv = driver().build_launch(make_machine(nic=None)).argv
    assert options(argv, "-netdev") == []


def test_a_build_without_seccomp_gets_no_sandbox_option() -> None:
    assert "-sandbox" not in driver(sandbox=False).build_launch(make_machine()).argv


def test_vsock_goes_through_the_host_kernel() -> None:
    machine = make_machine(vsock_cid=1030)
    argv = driver(vhost_vsock=True).build_launch(machine).argv
    assert "vhost-vsock-device,guest-cid=1030" in argv


def test_vsock_without_vhost_is_refused_with_a_hint() -> None:
    with pytest.raises(BangerError) as failed:
        driver().build_launch(make_machine(vsock_cid=1030))
    assert failed.value.reason == "unsupported"
    assert failed.value.hint == "sudo modprobe vhost_vsock"


def _split(option: str) -> list[str]:
    """QEMU's own rule (util/qemu-option.c): fields end at a comma that is not doubled."""
    fields, current, i = [], "", 0
    while i < len(option):
        if option[i] != ",":
            current += option[i]
        elif option[i + 1 : i + 2] == ",":
            current += ","
            i += 1
        else:
            fields.append(current)
            current = ""
        i += 1
    return [*fields, current]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=80))
def test_any_path_comes_back_whole_out_of_an_option(name: str) -> None:
    option = f"driver=raw,file.filename={escape('/' + name)},file.locking=off"
    assert _split(option) == ["driver=raw", f"file.filename=/{name}", "file.locking=off"]


@pytest.mark.parametrize("name", ["a,b", ",", "a,,b", "x=y,z", "nbd:host", "json:{}", "a b", "ü"])
def test_qemu_opens_the_file_that_was_meant(tmp_path: Path, name: str) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    disk = tmp_path / name
    disk.write_bytes(bytes(4096))
    machine = make_machine(state=tmp_path, nic=None)
    argv = driver().build_launch(machine).argv
    [image] = [v for v in options(argv, "-blockdev") if "node-name=image" in v]
    wanted = image.replace(escape(tmp_path / "image.disk"), escape(disk))
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "query-named-block-nodes"},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        [qemu, "-M", "none", "-display", "none", "-blockdev", wanted, "-qmp", "stdio"],
        input="\n".join(map(json.dumps, commands)).encode(),
        capture_output=True,
        check=True,
    )
    nodes = [
        node
        for line in done.stdout.splitlines()
        for node in json.loads(line).get("return", [])
        if isinstance(node, dict) and node.get("drv") == "file"
    ]
    assert [node["file"] for node in nodes] == [str(disk)]


async def _serve_status(status: dict[str, object], tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readline()
        writer.write(b'{"event": "RESUME"}\n{"return": {}}\n')
        assert json.loads(await reader.readline()) == {"execute": "query-status"}
        writer.write(json.dumps({"return": status}).encode() + b"\n")

    async with listening(tmp_path / "api.sock", answer):
        await driver().start(make_machine(runtime=tmp_path), asyncio.Event(), timeout_s=PATIENCE_S)


@pytest.mark.asyncio
async def test_a_running_guest_is_a_good_start(tmp_path: Path) -> None:
    await _serve_status({"running": True, "status": "running"}, tmp_path)


@pytest.mark.asyncio
async def test_a_guest_that_panicked_at_once_is_no_good_start(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="guest-panicked"):
        await _serve_status({"running": False, "status": "guest-panicked"}, tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", "connection"),
        (b'{"QMP": {', "connection"),
        (b"nonsense\n", "JSON"),
        (b'{"return": {}}\n', "greeting"),
        (GREETING + b'{"error": {"class": "X", "desc": "not today"}}\n', "not today"),
        (GREETING + b'{"return": 3}\n', "Expected"),
        (GREETING + b'{"event": "A"}\n' * 1001, "events only"),
        (b"x" * (2 << 20), "Separator"),
    ],
)
async def test_a_monitor_that_lies_is_an_error(tmp_path: Path, said: bytes, expected: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        if said.endswith(b"\n"):
            await reader.read()  # a whole answer: the client hangs up first

    async with listening(tmp_path / "api.sock", answer):
        with pytest.raises(BangerError, match=expected):
            await driver().pause(tmp_path)


@pytest.mark.asyncio
async def test_a_monitor_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(tmp_path / "api.sock", answer):
        with pytest.raises(BangerError) as failed:
            machine: Machine = make_machine(runtime=tmp_path)
            await driver().start(machine, asyncio.Event(), timeout_s=0.2)
    assert failed.value.reason == "timeout"
