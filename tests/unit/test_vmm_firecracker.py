"""The documents that the firecracker driver builds, and its API client against bad peers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.vmm import firecracker_api
from banger.vmm.firecracker import FirecrackerDriver, build_documents, make_links
from fakes.vmm import TAP, VM_ID, Answer, listening, make_machine
from patience import PATIENCE_S

DRIVER = FirecrackerDriver(program=Path("/opt/firecracker"), version="1.12.1")
NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


def test_the_launch_is_short_and_filtered() -> None:
    launch = DRIVER.build_launch(make_machine())
    assert launch.argv == (
        "/opt/firecracker",
        *("--id", VM_ID, "--api-sock", "api.sock", "--level", "Warning"),
    )
    assert "--no-seccomp" not in launch.argv


def test_the_documents_of_a_machine() -> None:
    drive = {"is_root_device": False, "io_engine": "Sync"}
    shared = {"is_read_only": True, "cache_type": "Unsafe", **drive}
    own = {"is_read_only": False, "cache_type": "Writeback", **drive}
    assert build_documents(make_machine(vsock_cid=1030)) == (
        ("/machine-config", {"vcpu_count": 2, "mem_size_mib": 512, "smt": False}),
        (
            "/boot-source",
            {
                "kernel_image_path": "kernel",
                "initrd_path": "initrd",
                "boot_args": "console=ttyS0 reboot=k panic=-1 quiet rdinit=/init pci=off "
                "i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests",
            },
        ),
        ("/drives/image", {"drive_id": "image", "path_on_host": "image", **shared}),
        ("/drives/overlay", {"drive_id": "overlay", "path_on_host": "overlay", **own}),
        ("/drives/work", {"drive_id": "work", "path_on_host": "work", **own}),
        ("/drives/modules", {"drive_id": "modules", "path_on_host": "modules", **shared}),
        (
            "/network-interfaces/eth0",
            {"iface_id": "eth0", "host_dev_name": TAP.tap, "guest_mac": TAP.mac},
        ),
        ("/vsock", {"guest_cid": 1030, "uds_path": "vsock.sock"}),
        ("/entropy", {}),
        ("/actions", {"action_type": "InstanceStart"}),
    )


def test_no_document_names_a_directory() -> None:
    # A snapshot keeps these names; restored elsewhere they must lead to that VM's own files.
    for path, document in build_documents(make_machine(vsock_cid=1030)):
        names = [v for k, v in document.items() if k.endswith("path") or k == "path_on_host"]
        assert not [n for n in names if "/" in str(n)], path


def test_a_machine_without_card_and_vsock_has_no_such_documents() -> None:
    paths = [path for path, _ in build_documents(make_machine(nic=None))]
    assert not [p for p in paths if p.startswith(("/network", "/vsock"))]


def test_links_lead_to_the_files_of_this_start(tmp_path: Path) -> None:
    make_links(make_machine(runtime=tmp_path, state=Path("/old")))
    make_links(make_machine(runtime=tmp_path, state=Path("/new")))
    assert {p.name: str(p.readlink()) for p in tmp_path.iterdir()} == {
        "kernel": "/new/vmlinux",
        "initrd": "/new/initrd.img",
        "image": "/new/image.disk",
        "overlay": "/new/overlay.disk",
        "work": "/new/work.disk",
        "modules": "/new/modules.disk",
    }


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, object]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.split(":")[1])
        for line in head.split("\r\n")
        if line.lower().startswith("content-length")
    )
    return head.split("\r\n")[0], json.loads(await reader.readexactly(length))


@pytest.mark.asyncio
async def test_every_document_is_sent_once_and_in_order(tmp_path: Path) -> None:
    got: list[tuple[str, object]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await _read_request(reader))
        writer.write(NO_CONTENT)

    machine = make_machine(runtime=tmp_path, vsock_cid=1030)
    async with listening(tmp_path / "api.sock", answer):
        await DRIVER.start(machine, asyncio.Event(), timeout_s=PATIENCE_S)
    assert got == [(f"PUT {path} HTTP/1.1", doc) for path, doc in build_documents(machine)]


@pytest.mark.asyncio
@pytest.mark.parametrize("refused", [path for path, _ in build_documents(make_machine())])
async def test_a_refusal_names_the_document_and_firecrackers_words(
    tmp_path: Path, refused: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _ = await _read_request(reader)
        if refused in line:
            body = b'{"fault_message":"The thing is wrong."}'
            head = b"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
        else:
            writer.write(NO_CONTENT)

    async with listening(tmp_path / "api.sock", answer):
        with pytest.raises(BangerError) as failed:
            await DRIVER.start(
                make_machine(runtime=tmp_path), asyncio.Event(), timeout_s=PATIENCE_S
            )
    assert failed.value.reason == "vmm_refused"
    assert refused in failed.value.message
    assert "The thing is wrong." in failed.value.message
    assert VM_ID[:8] in failed.value.message


@pytest.mark.asyncio
@pytest.mark.parametrize(("state", "call"), [("Paused", DRIVER.pause), ("Resumed", DRIVER.resume)])
async def test_pause_and_resume_patch_the_vm(tmp_path: Path, state: str, call: object) -> None:
    got: list[tuple[str, object]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await _read_request(reader))
        writer.write(NO_CONTENT)

    async with listening(tmp_path / "api.sock", answer):
        assert callable(call)
        await call(tmp_path)
    assert got == [("PATCH /vm HTTP/1.1", {"state": state})]


def _says(raw: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _read_request(reader)
        writer.write(raw)
        await writer.drain()

    return answer


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "connection"),
        (b"HTTP/1.1 20", "connection"),
        (b"HTTP/1.1 400 \r\nContent-Length: 100\r\n\r\nhalf", "connection"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not Firecracker's"),
        (b"HTTP/1.1 abc \r\n\r\n", "not Firecracker's"),
        (b"HTTP/1.1 200 \r\nContent-Length: -5\r\n\r\n", "-5 bytes"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", "99999999999 bytes"),
        (b"HTTP/1.1 200 \r\nContent-Length: many\r\n\r\n", "not Firecracker's"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "transfer encoding"),
        (b"X" * (2 << 20), "not Firecracker's"),
        (b"HTTP/1.1 500 \r\nContent-Length: 4\r\n\r\noops", "500: oops"),
        (b"HTTP/1.1 400 \r\n\r\n", "no reason given"),
        (b'HTTP/1.1 400 \r\nContent-Length: 19\r\n\r\n{"fault_message":3}', "400"),
    ],
)
async def test_a_peer_that_lies_or_stops_is_an_error(
    tmp_path: Path, raw: bytes, expected: str
) -> None:
    async with listening(tmp_path / "api.sock", _says(raw)):
        with pytest.raises(BangerError, match=expected):
            await DRIVER.pause(tmp_path)


@pytest.mark.asyncio
async def test_a_peer_that_hangs_is_given_up(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(tmp_path / "api.sock", answer):
        with pytest.raises(BangerError) as failed:
            await DRIVER.start(make_machine(runtime=tmp_path), asyncio.Event(), timeout_s=0.2)
    assert failed.value.reason == "timeout"


@pytest.mark.asyncio
async def test_a_refusal_carries_its_status(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", _says(b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n")):
        with pytest.raises(firecracker_api.Refused) as failed:
            await firecracker_api.send(tmp_path / "s", "PUT", "/nowhere", {})
    assert failed.value.status == 404
