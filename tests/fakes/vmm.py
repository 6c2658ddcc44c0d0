"""A machine to build with, and peers on a Unix socket that say whatever a test wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from banger.vmm.machine import ROLES, Drive, Machine, TapNic, UserNic

VM_ID = "0123456789abcdef0123456789abcdef"
MAC = "06:00:ac:10:00:02"
TAP = TapNic(tap="tap-fc-01234567", mac=MAC)
USER = UserNic(mac=MAC, agent_port=40001, announce_socket=Path("/run/banger/announce.sock"))

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def make_machine(
    *,
    state: Path = Path("/state"),
    runtime: Path = Path("/run/banger/vms/0123456789ab"),
    nic: TapNic | UserNic | None = TAP,
    vsock_cid: int | None = None,
    modules: bool = True,
    kernel_args_extra: str = "",
) -> Machine:
    """A plausible machine; the files need not exist."""
    return Machine(
        vm_id=VM_ID,
        vcpu=2,
        memory_mib=512,
        kernel=state / "vmlinux",
        initrd=state / "initrd.img",
        drives=tuple(
            Drive(role=role, path=state / f"{role}.disk", read_only=role in ("image", "modules"))
            for role in (ROLES if modules else ROLES[:3])
        ),
        nic=nic,
        vsock_cid=vsock_cid,
        runtime=runtime,
        kernel_args_extra=kernel_args_extra,
    )


@contextlib.asynccontextmanager
async def listening(socket: Path, answer: Answer) -> AsyncIterator[None]:
    """A peer on `socket` that runs `answer` for each connection, until the block ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(serve, path=socket)
    try:
        yield
    finally:
        server.close()
