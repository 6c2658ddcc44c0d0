"""`banger vm session logs, attach, send`: a session's bytes, spoken with the agent itself."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import click
import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.api import sessions as s
from banger.api.envelope import PROTOCOL_VERSION, Reply, Request, WireError
from banger.cli import stream
from banger.cli.errors import warn
from banger.cli.guest_run import attended
from banger.cli.server import Server
from banger.cli.vm_session import format_dropped, session_argument, vm_argument
from banger.errors import BangerError
from banger.rpc.frames import FrameDecoder, FrameType, encode
from banger.terminal_text import TerminalText

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from banger.cli.guest_command import GuestCommand

_CHUNK = 64 << 10
_START_CREDIT = 256 << 10
_LINE_LIMIT = 1 << 20


class _LogEnd(msgspec.Struct, frozen=True, kw_only=True):
    """`cursor` is the guest's word, and is printed."""

    cursor: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,64}\Z")]
    dropped: int
    state: str


class _Connection:
    """One request to the agent and the frames of its answer, with plain blocking calls.

    The machine's end counts as the connection's: a socket into it may stay silent.
    """

    def __init__(self, sock: socket.socket, machine: int | None, request: Request) -> None:
        self._sock = sock
        self._machine = machine
        self._decoder = FrameDecoder()
        self._rest = b""
        sock.setblocking(True)
        self.send(msgspec.json.encode(request) + b"\n")
        line = b""
        while b"\n" not in line and len(line) <= _LINE_LIMIT:
            line += self._receive()
        line, _, self._rest = line.partition(b"\n")
        reply = stream.decoded(line, Reply)
        if reply.error is not None:
            raise reply.error.exception()

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as e:
            raise _lost() from e

    def frames(self) -> Iterator[tuple[FrameType, bytes]]:
        """Frames until the stream's end; its error is raised."""
        while True:
            for kind, payload in self._decoder.feed(self._rest or self._receive()):
                if kind is FrameType.ERROR:
                    raise stream.decoded(payload, WireError).exception()
                yield kind, payload
            self._rest = b""

    def _receive(self) -> bytes:
        watched: list[Any] = [self._sock, *([] if self._machine is None else [self._machine])]
        ready = select.select(watched, [], [])[0]
        try:
            data = self._sock.recv(_CHUNK) if self._sock in ready else b""
        except OSError as e:
            raise _lost() from e
        if not data:
            raise _lost()
        return data


def _lost() -> BangerError:
    return BangerError(
        "operation_failed",
        "the connection to the guest ended",
        hint="banger vm list",
        reason="connection_lost",
    )


def _request(access: r.AgentAccess, method: str, params: dict[str, Any]) -> Request:
    return Request(
        version=PROTOCOL_VERSION,
        method=method,
        params=msgspec.Raw(msgspec.json.encode(params)),
        token=access.token,
    )


@click.command()
@vm_argument
@session_argument
@click.option("--stream", "which", type=click.Choice(["stdout", "stderr"]), help="Only this one.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the session ends.")
@click.option(
    "--tail",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only the last N lines, and what follows.",
)
@click.option("--since", metavar="CURSOR", help="Only what came after an earlier call.")
@click.option("--cursor", "tell", is_flag=True, help="End with the cursor for --since on stderr.")
@click.pass_obj
def logs(
    guest: GuestCommand,
    vm: str,
    session: str,
    which: str | None,
    follow: bool,
    tail: int | None,
    since: str | None,
    tell: bool,
) -> None:
    """Show what a session printed, on the streams on which it did.

    \b
    banger vm session logs web dev -f
    banger vm session logs web dev --tail 20 --stream stderr
    """
    guest.refuse()
    if since is not None and tail is not None:
        raise click.UsageError("--since and --tail exclude each other")
    params: dict[str, Any] = {"name": session, "follow": follow}
    if which is not None:
        params["stream"] = which
    if tail is not None:
        params["tail"] = tail
    if since is not None:
        params["since"] = since
    access, sock = Server().call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
    with sock, attended(access) as machine:
        end = _show(_Connection(sock, machine, _request(access, "session.logs", params)))
    if end.dropped:
        warn(format_dropped(end.dropped))
    if tell:
        sys.stderr.write(f"cursor: {end.cursor}\n")


def follow_on_stderr(sock: socket.socket, access: r.AgentAccess, session: str) -> None:
    """Show what a session prints, to its end, where it is nobody's result.

    Raises:
        BangerError: connection_lost; the session goes on.
    """
    params = {"name": session, "follow": True}
    with attended(access) as machine:
        _show(
            _Connection(sock, machine, _request(access, "session.logs", params)),
            stdout=sys.stderr.buffer,
        )


def _show(connection: _Connection, *, stdout: BinaryIO | None = None) -> _LogEnd:
    """Write output frames to the streams that they are of, up to the result. A terminal gets the
    text and its colours, and nothing else that it would act on."""
    outputs = {FrameType.STDOUT: stdout or sys.stdout.buffer, FrameType.STDERR: sys.stderr.buffer}
    colours = not os.environ.get("NO_COLOR")
    texts = {k: TerminalText(colours=colours) for k, out in outputs.items() if out.isatty()}

    def show(kind: FrameType, data: bytes) -> None:
        outputs[kind].write(data)
        outputs[kind].flush()

    try:
        for kind, payload in connection.frames():
            if kind is FrameType.RESULT:
                return stream.decoded(payload, _LogEnd)
            if kind in outputs:
                show(kind, texts[kind].feed(payload) if kind in texts else payload)
        raise _lost()
    finally:
        for kind, text in texts.items():
            show(kind, text.finish())


class _Attachment:
    """`banger.cli.stream` at a session: what it prints, and our keys as its input."""

    detachable = True

    def __init__(self, access: r.AgentAccess, session: s.Session) -> None:
        self._access = access
        self._session = session

    @property
    def tty(self) -> bool:
        return self._session.tty and os.isatty(0)

    def request(self) -> Request:
        return _request(self._access, "session.attach", {"name": self._session.name})


@click.command()
@vm_argument
@session_argument
@click.pass_obj
def attach(guest: GuestCommand, vm: str, session: str) -> int:
    """Join a session: its latest output, all that comes, and your input. Ctrl-] leaves it.

    Ctrl-C leaves it too, unless it has a terminal of its own: then it gets the key.
    The status is the session's when it ends while you watch.
    """
    guest.refuse()
    server = Server()
    found = server.call("vm.session.show", s.SessionRef(vm=vm, session=session), s.Session)
    access, sock = server.call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
    with sock, attended(access) as machine:
        status = stream.run(sock, _Attachment(access, found), machine=machine)
    if status != stream.DETACHED:
        return status
    warn(f"session {found.name} goes on; come back with: banger vm session attach {vm} {session}")
    return 0


@click.command()
@vm_argument
@session_argument
@click.argument("text", required=False)
@click.option("--end", is_flag=True, help="It is the last of the session's input.")
@click.option("-n", "--no-newline", is_flag=True, help="TEXT goes without a newline after it.")
@click.pass_obj
def send(
    guest: GuestCommand, vm: str, session: str, text: str | None, end: bool, no_newline: bool
) -> None:
    """Send TEXT, or all of stdin, to a session's input, as one piece.

    \b
    banger vm session send web repl 'print(1)'
    banger vm session send web job --end < data
    """
    guest.refuse()
    access, sock = Server().call_with_fd("vm.connect", p.VmRef(vm=vm), r.AgentAccess)
    with sock, attended(access) as machine:
        params = {"name": session, "end": end}
        connection = _Connection(sock, machine, _request(access, "session.send", params))
        if text is not None:
            _send_all(connection, _cut((text + ("" if no_newline else "\n")).encode()))
        else:
            _send_all(connection, iter(()) if end and os.isatty(0) else _stdin())


def _send_all(connection: _Connection, pieces: Iterator[bytes]) -> None:
    """Send everything, as the agent gives credit for it, and wait until it is taken."""
    credit = _START_CREDIT
    frames = connection.frames()
    for piece in pieces:
        while credit < len(piece):
            kind, payload = next(frames)
            if kind is FrameType.CREDIT:
                credit += int.from_bytes(payload[:4], "big")
        credit -= len(piece)
        connection.send(encode(FrameType.STDIN, piece))
    connection.send(encode(FrameType.STDIN_CLOSE))
    for kind, _ in frames:
        if kind is FrameType.RESULT:
            return


def _cut(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), _CHUNK):
        yield data[at : at + _CHUNK]


def _stdin() -> Iterator[bytes]:
    while data := os.read(0, _CHUNK):
        yield data
