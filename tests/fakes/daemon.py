"""A daemon that answers as a test says, behind the real server of `banger.rpc`, in a thread.

It listens where the command line under test looks for its daemon. Handlers are plain functions of
the decoded parameters; what was asked is in `asked`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from banger import __version__
from banger.daemon.handlers import build_methods
from banger.rpc.server import Call, Method, Server
from patience import PATIENCE_S

# Takes the parameters, or the call and the parameters.
Answer = Callable[..., Any]


class FakeDaemon:
    """The contract's own parameters and streaming, the test's answers."""

    def __init__(
        self, socket: Path, answers: dict[str, Answer], *, version: str, state: Path | None
    ) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.socket = socket
        contract = build_methods(None)  # type: ignore[arg-type]  # its handlers are replaced
        self._server = Server(
            socket,
            {
                name: Method(
                    params=contract[name].params,
                    streams=contract[name].streams,
                    handler=self._handler(name, answer),
                )
                for name, answer in answers.items()
            },
            owner_uid=os.geteuid(),
            version=version,
            state=state,
        )

    def _handler(self, name: str, answer: Answer) -> Callable[[Call, Any], Any]:
        async def handle(call: Call, params: Any) -> Any:
            self.asked.append((name, params))
            wanted = len(inspect.signature(answer).parameters)
            result = answer(call, params) if wanted == 2 else answer(params)
            return await result if inspect.isawaitable(result) else result

        return handle

    async def serve(self, ready: threading.Event, ending: asyncio.Event) -> None:
        self._server.listen()
        ready.set()
        serving = asyncio.ensure_future(self._server.serve())
        await ending.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await self._server.close()


@contextlib.contextmanager
def running_daemon(
    socket: Path,
    answers: dict[str, Answer],
    *,
    version: str = __version__,
    state: Path | None = None,
) -> Iterator[FakeDaemon]:
    """A daemon at `socket` until the block ends. `answers`: method → function of its parameters."""
    daemon = FakeDaemon(socket, answers, version=version, state=state)
    loop, ready, ending = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(daemon.serve(ready, ending)), name="fake daemon"
    )
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield daemon
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()
