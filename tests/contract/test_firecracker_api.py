"""Firecracker's documents against two judges: its published API, and the program itself.

The first part holds every document to the field names, types and ranges of Firecracker's OpenAPI
description (1.12), written down here as a table. The second starts the real program, which refuses
unknown fields, and sends it every document that the driver builds.

The program is looked for in BANGER_TEST_FIRECRACKER and in banger's own directory of fetched ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from banger.config.paths import Paths
from banger.errors import BangerError
from banger.vmm import firecracker_api
from banger.vmm.driver import wait_for_socket
from banger.vmm.firecracker import FirecrackerDriver, build_documents, make_links
from banger.vmm.kvm_probe import probe_kvm
from banger.vmm.machine import Machine, TapNic
from banger.vmm.programs import Program, find_firecracker
from fakes.vmm import MAC, make_machine
from patience import PATIENCE_S


@dataclass(frozen=True)
class Field:
    """One property of a document: its type, whether it must be there, what values it takes."""

    type: type
    required: bool = False
    least: int | None = None
    most: int | None = None
    one_of: tuple[str, ...] = ()


TEXT, FLAG = Field(str), Field(bool)
MUST_TEXT, MUST_FLAG = Field(str, required=True), Field(bool, required=True)
# By the last part of the path that has no variable in it.
API: dict[str, dict[str, Field]] = {
    "/machine-config": {
        "vcpu_count": Field(int, required=True, least=1, most=32),
        "mem_size_mib": Field(int, required=True, least=1),
        "smt": FLAG,
        "track_dirty_pages": FLAG,
    },
    "/boot-source": {"kernel_image_path": MUST_TEXT, "initrd_path": TEXT, "boot_args": TEXT},
    "/drives": {
        "drive_id": MUST_TEXT,
        "is_root_device": MUST_FLAG,
        "path_on_host": TEXT,
        "is_read_only": FLAG,
        "cache_type": Field(str, one_of=("Unsafe", "Writeback")),
        "io_engine": Field(str, one_of=("Sync", "Async")),
    },
    "/network-interfaces": {"iface_id": MUST_TEXT, "host_dev_name": MUST_TEXT, "guest_mac": TEXT},
    "/vsock": {"guest_cid": Field(int, required=True, least=3), "uds_path": MUST_TEXT},
    "/entropy": {},
    "/actions": {
        "action_type": Field(
            str, required=True, one_of=("FlushMetrics", "InstanceStart", "SendCtrlAltDel")
        )
    },
}
NAMED_IN_PATH = {"/drives": "drive_id", "/network-interfaces": "iface_id"}


def complaints(path: str, document: dict[str, object]) -> Iterator[str]:
    """What the published API says against a document."""
    resource = "/" + path.split("/")[1]
    fields = API[resource]
    for name in document.keys() - fields.keys():
        yield f"{name} is unknown"
    for name, field in fields.items():
        if name not in document:
            if field.required:
                yield f"{name} is missing"
            continue
        value = document[name]
        if type(value) is not field.type:
            yield f"{name} is {type(value).__name__}"
        elif field.one_of and value not in field.one_of:
            yield f"{name} is {value}"
        elif isinstance(value, int) and (
            (field.least is not None and value < field.least)
            or (field.most is not None and value > field.most)
        ):
            yield f"{name} is {value}"
    if resource in NAMED_IN_PATH and document.get(NAMED_IN_PATH[resource]) != path.split("/")[2]:
        yield f"{path} names another resource than its document"


@pytest.mark.parametrize(("path", "document"), build_documents(make_machine(vsock_cid=1030)))
def test_a_document_is_as_the_published_api_wants_it(
    path: str, document: dict[str, object]
) -> None:
    assert list(complaints(path, document)) == []


def test_every_resource_is_configured_before_the_start() -> None:
    paths = [path for path, _ in build_documents(make_machine(vsock_cid=1030))]
    assert {"/" + p.split("/")[1] for p in paths} == set(API)
    assert paths[-1] == "/actions"


@pytest.fixture(scope="module")
def firecracker() -> Program:
    """The real program, or a skip that names what is missing."""
    setting = os.environ.get("BANGER_TEST_FIRECRACKER")
    found = find_firecracker(setting, Paths.user_mode().bin)
    if not isinstance(found, Program):
        pytest.skip(found.message)
    return found


@dataclass
class Running:
    """A Firecracker that waits for documents."""

    driver: FirecrackerDriver
    machine: Machine
    process: asyncio.subprocess.Process
    exited: asyncio.Event


# A mount namespace in which /dev/kvm is a device that is no KVM.
HIDE_KVM = (
    "unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$0" "$@"',
)  # fmt: skip


@contextlib.asynccontextmanager
async def _running(program: Program, tmp_path: Path, *before: str) -> AsyncIterator[Running]:
    """The program started as its driver says, with small files in place of disks."""
    state, runtime = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    runtime.mkdir()
    machine = make_machine(state=state, runtime=runtime, nic=None, vsock_cid=1030)
    for drive in machine.drives:
        with drive.path.open("wb") as f:
            f.truncate(1 << 20)
    machine.kernel.write_bytes(_elf_that_halts())
    machine.initrd.write_bytes(bytes(4096))
    driver = FirecrackerDriver(program=program.path, version=program.version)
    launch = driver.build_launch(machine)
    with (tmp_path / "console.log").open("ab") as console:
        process = await asyncio.create_subprocess_exec(
            *before, *launch.argv, cwd=launch.cwd, stdin=asyncio.subprocess.DEVNULL,
            stdout=console, stderr=console, env={"PATH": os.defpath} if before else {},
        )  # fmt: skip
    exited = asyncio.Event()
    watch = asyncio.ensure_future(process.wait())
    watch.add_done_callback(lambda _: exited.set())
    try:
        yield Running(driver, machine, process, exited)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await watch


@pytest_asyncio.fixture
async def running(firecracker: Program, tmp_path: Path) -> AsyncIterator[Running]:
    async with _running(firecracker, tmp_path) as it:
        yield it


@pytest_asyncio.fixture
async def without_kvm(firecracker: Program, tmp_path: Path) -> AsyncIterator[Running]:
    """The same on a host whose KVM is absent or denied, or is made so for this process."""
    kvm = await asyncio.to_thread(probe_kvm)
    before: tuple[str, ...] = ()
    if kvm.kind not in ("absent", "denied"):
        if os.geteuid() != 0 or not shutil.which("unshare", path=os.defpath):
            pytest.skip("hiding /dev/kvm needs root and unshare")
        before = HIDE_KVM
    async with _running(firecracker, tmp_path, *before) as it:
        yield it


def _elf_that_halts() -> bytes:
    """The smallest 64-bit kernel that Firecracker's loader takes: one segment at 1 MiB."""
    header = bytes.fromhex("7f454c46020101") + bytes(9)
    header += b"".join(
        n.to_bytes(size, "little")
        for n, size in (
            (2, 2), (62, 2), (1, 4), (0x100000, 8), (64, 8), (0, 8),
            (0, 4), (64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2),
        )
    )  # fmt: skip
    code = b"\xf4\xeb\xfd"  # hlt; jmp to it
    segment = b"".join(
        n.to_bytes(size, "little")
        for n, size in (
            (1, 4), (5, 4), (0x1000, 8), (0x100000, 8), (0x100000, 8),
            (len(code), 8), (len(code), 8), (0x1000, 8),
        )
    )  # fmt: skip
    return (header + segment).ljust(0x1000, b"\0") + code


@pytest.mark.asyncio
async def test_the_real_firecracker_takes_every_document(running: Running) -> None:
    socket = running.machine.runtime / "api.sock"
    make_links(running.machine)
    await asyncio.wait_for(wait_for_socket(socket), PATIENCE_S)
    for path, document in build_documents(running.machine)[:-1]:
        await firecracker_api.send(socket, "PUT", path, document)


@pytest.mark.asyncio
async def test_the_real_firecracker_knows_the_fields_of_a_network_card(running: Running) -> None:
    # `lo` is no tap: the refusal shows that it got as far as opening it.
    socket = running.machine.runtime / "api.sock"
    await asyncio.wait_for(wait_for_socket(socket), PATIENCE_S)
    [(path, document)] = [
        d
        for d in build_documents(make_machine(nic=TapNic(tap="lo", mac=MAC)))
        if d[0].startswith("/network-interfaces")
    ]
    with pytest.raises(firecracker_api.Refused) as refused:
        await firecracker_api.send(socket, "PUT", path, document)
    assert "unknown field" not in refused.value.fault
    assert "tap" in refused.value.fault.lower()


@pytest.mark.asyncio
async def test_the_real_firecracker_refuses_a_field_that_it_does_not_know(
    running: Running,
) -> None:
    # What makes it a judge: an unknown field is an error in each resource that has fields.
    socket = running.machine.runtime / "api.sock"
    make_links(running.machine)
    await asyncio.wait_for(wait_for_socket(socket), PATIENCE_S)
    for path, document in build_documents(running.machine):
        with pytest.raises(firecracker_api.Refused, match="unknown field"):
            await firecracker_api.send(socket, "PUT", path, document | {"x_unknown": 1})


@pytest.mark.asyncio
async def test_a_start_without_kvm_fails_in_firecrackers_own_words(
    without_kvm: Running, tmp_path: Path
) -> None:
    with pytest.raises(BangerError) as failed:
        await without_kvm.driver.start(
            without_kvm.machine, without_kvm.exited, timeout_s=PATIENCE_S
        )
    assert failed.value.reason == "vmm_refused"
    assert "PUT /actions: Firecracker answered 400" in failed.value.message
    assert "KVM" in failed.value.message


@pytest.mark.asyncio
async def test_a_kernel_that_is_missing_is_named_in_firecrackers_own_words(
    running: Running,
) -> None:
    running.machine.kernel.unlink()
    with pytest.raises(BangerError) as failed:
        await running.driver.start(running.machine, running.exited, timeout_s=PATIENCE_S)
    assert "/boot-source" in failed.value.message
    assert "No such file" in failed.value.message


@pytest.mark.asyncio
async def test_a_killed_firecracker_is_told_as_an_exit(running: Running) -> None:
    running.process.kill()
    with pytest.raises(BangerError) as failed:
        await running.driver.start(running.machine, running.exited, timeout_s=PATIENCE_S)
    assert failed.value.reason == "vmm_exited"


def test_a_second_launch_fails_where_sockets_were_left(
    firecracker: Program, tmp_path: Path
) -> None:
    # Why remove_stale_sockets exists.
    (tmp_path / "api.sock").touch()
    driver = FirecrackerDriver(program=firecracker.path, version=firecracker.version)
    launch = driver.build_launch(make_machine(runtime=tmp_path))
    done = subprocess.run(
        launch.argv,
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode != 0


def test_the_program_is_static_enough_to_run_with_an_empty_environment(
    firecracker: Program,
) -> None:
    assert shutil.which(str(firecracker.path))
    done = subprocess.run([firecracker.path, "--version"], env={}, capture_output=True, check=True)
    assert firecracker.version in done.stdout.decode()
