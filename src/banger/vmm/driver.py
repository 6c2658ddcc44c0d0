"""What every VMM driver offers, and the one way in which drivers wait: with the exit in view.

A driver is a value that knows a program and how to talk to it. It owns no process: the host room
starts it, and the process lives on when the daemon ends. Nothing here kills it either.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol, TypeVar

from banger.errors import BangerError
from banger.rpc.unix import short_path
from banger.vmm.machine import API_SOCKET, VSOCK_SOCKET, Capabilities, Launch, Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    from banger.api.records import VmmName

T = TypeVar("T")
# From 2 ms, doubled up to 50 ms: Firecracker's socket is there after 10 to 20 ms.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05
_LINE_LIMIT = 1 << 20
# How long after a broken connection the exit of the VMM may take to be seen.
_EXIT_FOLLOWS_S = 1.0


class Driver(Protocol):
    """One VMM. `build_launch` decides and is pure; the others talk to a process that runs."""

    @property
    def name(self) -> VmmName: ...
    @property
    def version(self) -> str: ...
    @property
    def program(self) -> Path: ...
    @property
    def capabilities(self) -> Capabilities: ...

    def build_launch(self, machine: Machine) -> Launch:
        """The command to start.

        Raises:
            BangerError: unsupported: this driver cannot run such a machine.
        """

    async def start(
        self, machine: Machine, exited: asyncio.Event, *, timeout_s: float = 30
    ) -> None:
        """Bring a launched VMM to the point where its guest runs.

        Raises:
            BangerError: the VMM ended (`exited` was set), refused, or did not answer in time.
        """

    async def pause(self, runtime: Path) -> None:
        """Stop the vCPUs; the guest's memory stays."""

    async def resume(self, runtime: Path) -> None:
        """Let the vCPUs run on."""


def remove_stale_sockets(runtime: Path) -> None:
    """Remove what an earlier VMM left in a runtime directory, before a launch into it.

    Firecracker refuses to start where its socket file exists, even when nobody listens on it.
    """
    for path in (runtime / API_SOCKET, runtime / VSOCK_SOCKET):
        path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def connected(
    socket: Path,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream connection to a VMM's Unix socket; closed at the end.

    Raises:
        OSError: as connect(2): ENOENT or ECONNREFUSED while nobody listens.
    """
    with short_path(socket) as path:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def wait_for_socket(socket: Path) -> None:
    """Return when somebody accepts connections on `socket`. The caller sets the deadline.

    The VMM makes the socket itself and tells nobody, so this looks, at growing intervals.
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            async with connected(socket):
                return
        except (FileNotFoundError, ConnectionRefusedError):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


async def before_exit(
    work: Coroutine[object, object, T],
    exited: asyncio.Event | None,
    *,
    doing: str,
    timeout_s: float,
) -> T:
    """The result of `work`, unless the VMM ends or `timeout_s` passes first.

    `exited` is None where nobody watches the process; a broken connection is then all that tells.

    Raises:
        BangerError: reason `vmm_exited` or `timeout`; and whatever `work` raises while it lives.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future((exited or asyncio.Event()).wait())
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        error = task.exception() if task.done() else None
        if exited is not None and isinstance(error, ConnectionError | EOFError):
            # A dying VMM closes its socket before its exit is seen: let the exit have the word.
            await asyncio.wait({gone}, timeout=_EXIT_FOLLOWS_S)
        if task.done() and not isinstance(error, OSError | EOFError):
            return task.result()
        if gone.done():
            raise BangerError(
                "operation_failed", f"{doing}: the VMM ended", reason="vmm_exited"
            ) from error
        if error is not None:
            broken = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise BangerError(
                "operation_failed",
                f"{doing}: the connection to the VMM broke: {broken}",
                reason="connection_lost",
            ) from error
        raise BangerError(
            "operation_failed", f"{doing}: no answer within {timeout_s:g} s", reason="timeout"
        )
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
