"""A VMM without a machine: a shell that does what is written into its FIFO, and a guest beside it.

The process is real, started, watched and killed by `banger.host.vmm_process`; what a VMM would
print goes to its console. Which kind of boot comes next is the test's to say.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

from banger.api.records import VmmName
from banger.vmm.driver import before_exit
from banger.vmm.machine import Capabilities, Launch, Machine, UserNic
from fakes.faults import Faults
from fakes.guest import FakeGuest, read_config

# ready: the guest announces itself. silent: it never does. dies: it panics first. dies_early: the
# VMM ends while it is being configured. liar: a wrong token. stranger: another VM's id.
Boot = Literal["ready", "silent", "dies", "dies_early", "liar", "stranger"]
PANIC = "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs"
_LIFE = "life"


class FakeDriver:
    """Points: `driver.build_launch`, `driver.start`, `driver.pause`, `driver.resume`."""

    def __init__(
        self, faults: Faults, *, emulated: bool = False, user_network: bool = False
    ) -> None:
        self.name: VmmName = "qemu" if user_network else "firecracker"
        self.version = "0.0.0-fake"
        self.program = Path("/bin/sh")
        self.capabilities = Capabilities(
            vsock=None if user_network else "unix",
            snapshot=False,
            emulated=emulated,
            user_network=user_network,
        )
        self.boots: deque[Boot] = deque()
        self.guests: dict[str, FakeGuest] = {}
        self.standing: set[str] = set()  # the machines that are paused
        self.put_error: str | None = None  # what guests that come up from now on say to a `put`
        self.guest_loop: asyncio.AbstractEventLoop | None = None
        """Where guests live whose machines outlive the daemon's own loop."""
        self._faults = faults
        self._lives: dict[str, list[int]] = {}
        self._tasks: set[asyncio.Task[bool]] = set()

    def build_launch(self, machine: Machine) -> Launch:
        self._faults.check("driver.build_launch")
        # Open for both, so that neither end ever waits for the other.
        path = machine.runtime / _LIFE
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        # An earlier machine's stays open too: closing it would end that machine.
        self._lives.setdefault(machine.vm_id, []).append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return Launch(argv=(str(self.program), _LIFE), cwd=machine.runtime)

    def power_off(self, vm_id: str, script: str = "exit 0") -> None:
        """Let the machine say something and end."""
        os.write(self._lives[vm_id][-1], f"{script}\n".encode())

    async def start(
        self, machine: Machine, exited: asyncio.Event, *, timeout_s: float = 30
    ) -> None:
        await self._faults.arrive("driver.start")
        boot = self.boots.popleft() if self.boots else "ready"
        vm_id = machine.vm_id
        if boot == "dies_early":
            self.power_off(vm_id, "echo bad option; exit 1")
            await before_exit(
                asyncio.Event().wait(), exited, doing="configuring", timeout_s=timeout_s
            )
        guest = FakeGuest(
            machine.runtime,
            read_config(machine.initrd),
            lambda: self.power_off(vm_id),
            port=machine.nic.agent_port if isinstance(machine.nic, UserNic) else None,
        )
        if earlier := self.guests.get(vm_id):
            await self._for_guest(earlier.end())
        guest.put_error = self.put_error
        try:
            await self._for_guest(guest.listen())
        except BaseException:
            await guest.end()
            raise
        # Last, because tests wait for it: who is known here listens.
        self.guests[vm_id] = guest
        match boot:
            case "ready":
                self._spawn(guest.announce())
            case "liar":
                self._spawn(guest.announce(token="0" * 64))
            case "stranger":
                self._spawn(guest.announce(vm_id="f" * 32))
            case "dies":
                self.power_off(vm_id, f"echo '{PANIC}'; echo; exit 3")

    async def _for_guest(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self.guest_loop is None:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.guest_loop))

    def _spawn(self, work: Coroutine[Any, Any, bool]) -> None:
        loop = self.guest_loop or asyncio.get_running_loop()

        def begin() -> None:
            # Kept here: the loop itself would let it go.
            task = loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if self.guest_loop is None:
            begin()
        else:
            loop.call_soon_threadsafe(begin)

    async def pause(self, runtime: Path) -> None:
        await self._faults.arrive("driver.pause")
        self.standing.add(self._whose(runtime))

    async def resume(self, runtime: Path) -> None:
        await self._faults.arrive("driver.resume")
        self.standing.discard(self._whose(runtime))

    def _whose(self, runtime: Path) -> str:
        return next(vm_id for vm_id in self._lives if vm_id.startswith(runtime.name))

    async def close(self) -> None:
        if self.guest_loop is None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in self.guests.values():
            await self._for_guest(guest.end())
        for fds in self._lives.values():
            for fd in fds:
                os.close(fd)
        self._lives.clear()
