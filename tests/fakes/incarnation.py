"""A whole daemon in a thread: real server, handlers, rooms and socket, over a world of fakes.

`Installation` outlives its daemons. `kill` stops the daemon's event loop where it is, for good,
and closes its sockets, as SIGKILL would: no rollback runs, no lock is given back, and the machines
go on. What was frozen so is unwound at the very end, when nobody looks any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from banger import __version__
from banger.api import operations as o
from banger.config.settings import Settings
from banger.daemon import daemon as daemon_module
from banger.daemon.daemon import Daemon
from banger.daemon.handlers import build_methods
from banger.rpc import client
from banger.rpc.operations import Operations
from banger.rpc.server import Server
from banger.vmm.probe import Verdict
from fakes.world import World
from patience import PATIENCE_S

T = TypeVar("T")

VERDICT = Verdict(
    driver="firecracker", accel="kvm", kvm_usable=True, kvm_kind="works", evidence=(),
    problems=(), firecracker=None, qemu=None, vhost_vsock=False, tsc_khz=None,
)  # fmt: skip


def use_fakes(patch: pytest.MonkeyPatch, world: World) -> None:
    """Daemons that are made from now on find the world's VMM."""
    patch.setattr(daemon_module, "probe", lambda **_: VERDICT)
    patch.setattr(daemon_module, "choose_driver", lambda *_, **__: world.driver)


class _Server(Server):
    """Remembers its connections, for `Incarnation.kill`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connections: set[socket.socket] = set()

    async def _connection(self, sock: socket.socket) -> None:
        self.connections.add(sock)
        try:
            await super()._connection(sock)
        finally:
            self.connections.discard(sock)


class Incarnation:
    """One life of the daemon."""

    daemon: Daemon
    server: _Server

    def __init__(self, world: World, settings: Settings) -> None:
        self.loop = asyncio.new_event_loop()
        self._world = world
        self._settings = settings
        self._frozen = threading.Event()
        self._unwind = threading.Event()
        self.killed = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="daemon")
        self._thread.start()
        self._ready.result(PATIENCE_S)

    def _live(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            # Here, because the database belongs to the thread that opened it.
            self.daemon = Daemon(self._world.paths, self._world.host, self._settings)  # type: ignore[arg-type]  # as Host
            self.server = _Server(
                self._world.paths.daemon_socket,
                build_methods(self.daemon),
                owner_uid=os.geteuid(),
                version=__version__,
                operations=Operations(self._world.paths.operations),
            )
            running = self.loop.create_task(
                self.daemon.run(self.server, lambda: self._ready.set_result(None))
            )
            running.add_done_callback(lambda _: self.killed or self.loop.stop())
            self.loop.run_forever()
            if not self.killed and (error := running.exception()) is not None:
                raise error
        except BaseException as e:
            if not self._ready.done():
                self._ready.set_exception(e)
            raise
        finally:
            self._frozen.set()
            if self.killed:
                self._unwind.wait()
                self.loop.run_until_complete(self._cancel_everything())
                self.loop.run_until_complete(self.daemon.names.close())
                self.daemon.store.close()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    async def _cancel_everything(self) -> None:
        me = asyncio.current_task()
        while others := [task for task in asyncio.all_tasks() if task is not me]:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=1)

    def stop(self) -> None:
        """End in order, as by SIGTERM."""
        self.loop.call_soon_threadsafe(self.daemon.stopping.set)
        self._thread.join()

    def kill(self) -> None:
        """End as by SIGKILL."""
        self.killed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        # A loop that is blocked in a call of ours freezes when that returns.
        self._frozen.wait(PATIENCE_S)
        for sock in (self.server._socket, *self.server.connections):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self.server.operations.close()

    def unwind(self) -> None:
        """After a kill: let the frozen tasks end, whatever they do then."""
        self._unwind.set()
        self._thread.join()

    def idle(self) -> str:
        """Why the daemon is not idle; empty when it is."""
        if self.server.active:
            return f"{self.server.active} calls"
        if self.daemon.vms.busy:
            return f"{self.daemon.vms.busy} tasks of their own"
        running = [row.kind for row in self.server.operations.list() if not row.done]
        return f"operations {running}" if running else ""


class Installation:
    """A world, its guests, and the daemon of the moment. Blocking: the daemon has a thread."""

    def __init__(self, templates: Path, **settings: Any) -> None:
        self.patch = pytest.MonkeyPatch()
        self.world = World(templates=templates)
        use_fakes(self.patch, self.world)
        defaults: dict[str, Any] = {
            "dns_listen_addr": "127.0.0.1:0", "disk_reserve": "1M", "memory_budget_percent": 95,
            "ready_timeout": "30s", "stop_timeout": "1s",
        }  # fmt: skip
        self.settings = Settings(**{**defaults, **settings})
        self._guests = asyncio.new_event_loop()
        self._guest_thread = threading.Thread(target=self._guests.run_forever, name="guests")
        self._guest_thread.start()
        self.world.driver.guest_loop = self._guests
        self._dead: list[Incarnation] = []
        self.now = Incarnation(self.world, self.settings)

    @property
    def socket(self) -> Path:
        return self.world.paths.daemon_socket

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        return [self.now.loop]

    def call(self, method: str, params: Any, kind: Any = Any) -> Any:
        return client.call(self.socket, method, params, kind)

    def stream(self, method: str, params: Any, kind: Any = Any) -> Any:
        with client.StreamingCall(self.socket, method, params, lambda _: None) as call:
            return call.result(kind)

    def ask(self, method: str, params: Any) -> client.StreamingCall:
        """Begin a streaming call, and leave its end to the caller."""
        return client.StreamingCall(self.socket, method, params, lambda _: None)

    def operations(self) -> list[o.Operation]:
        rows: list[o.Operation] = self.call("daemon.operations.list", {}, list[o.Operation])
        return rows

    def wait_idle(self) -> None:
        """Until the daemon does nothing any more."""
        wait_until(lambda: not self.now.idle(), lambda: self.now.idle())

    def restart(self) -> None:
        self.now.stop()
        self.now = Incarnation(self.world, self.settings)

    def crash(self) -> None:
        """The daemon is killed, and the next one starts."""
        self.now.kill()
        self._dead.append(self.now)
        self.now = Incarnation(self.world, self.settings)

    def close(self) -> None:
        if self.now.killed:
            self._dead.append(self.now)
        else:
            self.now.stop()
        for dead in self._dead:
            dead.unwind()
        self.world.faults.clear()
        asyncio.run(self.world.close())
        self._guests.call_soon_threadsafe(self._guests.stop)
        self._guest_thread.join()
        self._guests.run_until_complete(_end_all())
        self._guests.close()
        self.patch.undo()


async def _end_all() -> None:
    me = asyncio.current_task()
    # A connection that was just taken becomes a task in the next turn, and closes in the one after.
    for _ in range(4):
        others = [task for task in asyncio.all_tasks() if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)


def wait_until(condition: Callable[[], object], describe: Callable[[], str] = lambda: "") -> None:
    """Until something that another thread does is seen; AssertionError after some seconds."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError(f"it did not happen within {PATIENCE_S:g} s: {describe()}")


@contextlib.contextmanager
def installation(templates: Path, **settings: Any) -> Iterator[Installation]:
    """An installation with a daemon, until the block ends."""
    made = Installation(templates, **settings)
    try:
        yield made
    finally:
        made.close()
