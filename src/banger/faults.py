"""Named steps of what banger does, and a switch by which a test lets one of them go wrong.

`step("start.lease")` surrounds a piece of work, as `with` or as `async with`. Unless a test has
armed this module it does nothing and costs a comparison. Armed, an order says what happens where:

    STEP:MOMENT:ACTION[:SECONDS]        start.lease:during:kill

Moments: `before` the body; `during` it, which is its first suspension in a coroutine and, in a
thread, just before its first change of the host's files (`during+2`: the third one; a body without
a middle counts at its end); `after` it. Actions: `fail` (BangerError), `enospc` (OSError), `hang`
(until cancelled, or for so many seconds), `stop` (SIGSTOP: a test ends what it wants meanwhile
and lets us go on), `kill` (`kill -9` of ourselves). An order is carried out once: it leaves a file,
so that the next daemon does not meet it again.

A program is armed by BANGER_FAULTS=DIRECTORY:ORDER[,ORDER…], which is for tests alone: the daemon
of a system installation never looks at it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple

from banger.errors import BangerError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

VARIABLE = "BANGER_FAULTS"
MOMENTS = ("before", "during", "after")
ACTIONS = ("fail", "enospc", "hang", "stop", "kill")

# Every step of the code, by path, in the order in which it happens. A contract test holds the two
# together, and the fault matrices are made from it.
STEPS: dict[str, tuple[str, ...]] = {
    "create": ("create.reserve", "create.secrets"),
    "start": (
        "start.clean",
        "start.plan",
        "start.disks",
        "start.lease",
        "start.handles",
        "start.launch",
        "start.process",
        "start.configure",
        "start.ready",
        "start.file_sync",
        "start.publish",
    ),
    "stop": ("stop.guest", "stop.exit"),
    "kill": ("kill.signal",),
    # What stop, kill, delete, a start that fails and reconcile have in common.
    "release": (
        "release.process",
        "release.lease",
        "release.sockets",
        "release.handles",
        "release.record",
    ),
    "delete": ("delete.known_hosts", "delete.aside", "delete.row", "delete.files"),
    "set": ("set.lease", "set.handles", "set.record"),
    # Images and kernels: what is built once and kept, and how entries appear and disappear.
    "artefact": ("artefact.build", "artefact.seal", "artefact.publish"),
    "pull": ("pull.layers", "pull.rootfs", "pull.describe"),
    "image": ("image.sync", "image.publish"),
    "promote": ("promote.copy", "promote.place", "promote.record"),
    "kernel": ("kernel.publish",),
    "discard": ("discard.image", "discard.kernel"),
    # Workspaces. `apply` runs in the command line, with its user's rights.
    "prepare": ("prepare.put", "prepare.record"),
    "export": ("export.compare", "export.write"),
    "apply": ("apply.receive", "apply.remove", "apply.move"),
}

_MOST_HANG_S = 60.0
# What changes files or starts programs, as the interpreter tells it (sys.audit).
_CHANGES = frozenset(
    ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
     "os.chmod", "subprocess.Popen")
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Order(NamedTuple):
    """What is to go wrong. `skip`: changes of files that pass before it, for `during` alone."""

    step: str
    moment: str
    action: str
    seconds: float | None = None
    skip: int = 0

    def __str__(self) -> str:
        skip = f"+{self.skip}" if self.skip else ""
        seconds = "" if self.seconds is None else f":{self.seconds:g}"
        return f"{self.step}:{self.moment}{skip}:{self.action}{seconds}"


def parse_order(text: str) -> Order:
    """Raises ValueError, saying what is wrong."""
    words = text.split(":")
    if len(words) not in (3, 4):
        raise ValueError(f"{text!r} is not STEP:MOMENT:ACTION[:SECONDS]")
    name, moment, action = words[:3]
    moment, _, skip = moment.partition("+")
    if not any(name in steps for steps in STEPS.values()):
        raise ValueError(f"there is no step {name!r}")
    if moment not in MOMENTS:
        raise ValueError(f"{moment!r} is no moment: one of {', '.join(MOMENTS)}")
    seconds = float(words[3]) if len(words) == 4 else None
    return Order(name, moment, action, seconds, int(skip or 0))


class Met:
    """What a process has passed since it was armed: its steps, and the changes of files in each
    step of a thread."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.changes: dict[str, int] = {}


class _Armed:
    """The orders of this process. With `marks`, a directory, they are remembered beyond it."""

    def __init__(
        self,
        orders: Iterable[Order],
        marks: str | None,
        actions: Mapping[str, Callable[[Order], None]],
    ) -> None:
        self.orders = tuple(orders)
        self._marks = marks
        self.actions = actions
        self._taken: set[Order] = set()
        self.met = Met()
        for order in self.orders:
            if order.action not in (*ACTIONS, *actions):
                raise ValueError(f"{order.action!r} is no action: one of {', '.join(ACTIONS)}")

    def take(self, order: Order) -> bool:
        """Whether this order is still to be carried out; from now on it is not."""
        if order in self._taken:
            return False
        self._taken.add(order)
        if self._marks is None:
            return True
        try:
            os.close(os.open(f"{self._marks}/{order}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True

    def find(self, name: str, moment: str) -> Order | None:
        return next((o for o in self.orders if (o.step, o.moment) == (name, moment)), None)


_armed: _Armed | None = None
_hooked = False
# The step of this thread that waits for its middle, a change of files.
_waiting = threading.local()


def arm(
    orders: Iterable[str],
    *,
    marks: Path | None = None,
    actions: Mapping[str, Callable[[Order], None]] | None = None,
) -> Met:
    """From now on carry out these orders. `actions` gives more kinds of them, or others.

    Raises:
        ValueError: an order cannot be meant.
    """
    global _armed, _hooked
    _armed = _Armed(map(parse_order, orders), str(marks) if marks else None, actions or {})
    if not _hooked:
        # It stays for the life of the process: only a test gets here.
        sys.addaudithook(_look)
        _hooked = True
    return _armed.met


def arm_from_environment() -> None:
    """Arm as BANGER_FAULTS says, if it does. Raises BangerError, bad_request."""
    value = os.environ.get(VARIABLE)
    if not value:
        return
    marks, _, orders = value.partition(":")
    try:
        from pathlib import Path

        arm(orders.split(","), marks=Path(marks))
    except ValueError as e:
        raise BangerError(
            "bad_request", f"{VARIABLE}: {e}", hint=f"unset {VARIABLE}; it is for tests"
        ) from e


def disarm() -> None:
    global _armed
    _armed = None


class Step:
    """One step, for one `with` or `async with`. This one is of a process that is not armed."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        return None

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        return None


_UNARMED = Step()


def step(name: str) -> Step:
    """Surround the step of this name, which stands in `STEPS`."""
    if _armed is None:
        return _UNARMED
    _armed.met.steps.append(name)
    return _Watched(name, _armed)


class _Watched(Step):
    def __init__(self, name: str, armed: _Armed) -> None:
        self._name = name
        self._armed = armed
        self._middle = armed.find(name, "during")
        self._left = self._middle.skip if self._middle else 0
        self._outer: _Watched | None = None
        # Of a coroutine: what its middle ordered, to be carried out where it can be.
        self._task: asyncio.Task[object] | None = None
        self._error: BaseException | None = None
        self._hanging: Order | None = None

    def _due(self, moment: str) -> Order | None:
        order = self._armed.find(self._name, moment)
        return order if order is not None and self._armed.take(order) else None

    # In a thread
    def __enter__(self) -> None:
        self._act(self._due("before"))
        self._outer = getattr(_waiting, "step", None)
        _waiting.step = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        _waiting.step = self._outer
        if error is not None:
            return
        if self._middle is not None and not self._middle.skip:
            self._act(self._due("during"))
        self._act(self._due("after"))

    def changing(self) -> None:
        """This thread is about to change the host's files."""
        changes = self._armed.met.changes
        changes[self._name] = changes.get(self._name, 0) + 1
        self._left -= 1
        if self._middle is not None and self._left == -1:
            # What the order does itself is no change of the step's.
            _waiting.step = None
            try:
                self._act(self._due("during"))
            finally:
                _waiting.step = self

    def _act(self, order: Order | None) -> None:
        """Carry out an order where only a thread waits."""
        if order is None:
            return
        if order.action == "hang" and "hang" not in self._armed.actions:
            threading.Event().wait(_MOST_HANG_S if order.seconds is None else order.seconds)
        elif (error := self._carry_out(order)) is not None:
            raise error

    def _carry_out(self, order: Order) -> Exception | None:
        """Everything but `hang`; the error to raise for those who can."""
        if (perform := self._armed.actions.get(order.action)) is not None:
            perform(order)
        elif order.action == "fail":
            return BangerError(
                "operation_failed", f"{order.step} failed as ordered", reason="injected"
            )
        elif order.action == "enospc":
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), order.step)
        elif order.action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if order.action == "kill" else signal.SIGSTOP)
        return None

    # In a coroutine
    async def __aenter__(self) -> None:
        await self._act_async(self._due("before"))
        if self._middle is not None:
            import asyncio

            self._task = asyncio.current_task()
            # Its turn comes when the body is suspended for the first time.
            asyncio.get_running_loop().call_soon(self._suspended)

    def _suspended(self) -> None:
        task, self._task = self._task, None
        if task is None or (order := self._due("during")) is None:
            return
        if order.action == "hang" and "hang" not in self._armed.actions:
            self._hanging = order
        elif (error := self._carry_out(order)) is not None:
            self._error = error
            task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        waiting, self._task = self._task, None
        if self._error is not None:
            import asyncio

            # The cancellation was ours (as in asyncio.timeout).
            current = asyncio.current_task()
            if current is not None and current.uncancel() == 0:
                raise self._error from None
        if error is not None:
            return
        if waiting is not None:
            await self._act_async(self._due("during"))
        await self._hang(self._hanging)
        await self._act_async(self._due("after"))

    async def _act_async(self, order: Order | None) -> None:
        if order is None:
            return
        if order.action == "hang" and "hang" not in self._armed.actions:
            await self._hang(order)
        elif (error := self._carry_out(order)) is not None:
            raise error
        else:
            import asyncio

            # Whatever the action did to others, they learn of it first.
            await asyncio.sleep(0)

    async def _hang(self, order: Order | None) -> None:
        if order is None:
            return
        import asyncio  # here: a command line that is not armed need not pay for it

        if order.seconds is not None:
            await asyncio.sleep(order.seconds)
        else:
            await asyncio.Event().wait()


def _look(event: str, args: tuple[object, ...]) -> None:
    """The interpreter is about to do something (sys.addaudithook)."""
    if _armed is None or (watched := getattr(_waiting, "step", None)) is None:
        return
    if event in _CHANGES or (
        event == "open" and isinstance(args[2], int) and bool(args[2] & _WRITES)
    ):
        watched.changing()
