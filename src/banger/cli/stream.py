"""A guest command's streams: stdin, stdout, stderr, terminal, signals, and its exit.

Speaks frames with the agent over the descriptor that the daemon passed, so that neither the
daemon's slowness nor its end touches the command. The terminal is raw only inside `run`, and is
restored on every way out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import stat
import struct
import sys
import termios
import time
import tty
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import msgspec

from banger.api.envelope import PROTOCOL_VERSION, Reply, Request, WireError
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.rpc.frames import FrameDecoder, FrameType, encode

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

T = TypeVar("T")

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_TERMINALS = (signal.SIGWINCH, signal.SIGTSTP)
_GIVE_UP_AFTER, _GIVE_UP_WITHIN_S = 3, 2.0
_CHUNK = 128 << 10
_HOLD = 1 << 20  # output kept here while our reader is slow; beyond it the guest waits
_PIPE_ATOMIC = 4096  # a pipe that polls writable takes this much without blocking (pipe(7))
_DETACH_KEY = b"\x1d"  # Ctrl-]
DETACHED = -1
"""In place of a status: the client has left, and the session goes on."""
_NOT_TOLD = "the connection to the guest ended before the command did"


class Peer(Protocol):
    """What is at the other end: the first line, and how our terminal and signals are used."""

    @property
    def tty(self) -> bool:
        """It has a terminal of its own, so ours is raw."""

    @property
    def detachable(self) -> bool:
        """It lives on without us: signals and Ctrl-] end our part only."""

    def request(self) -> Request: ...


@dataclass(frozen=True, kw_only=True)
class GuestProcess:
    """What to run: `argv` empty is a login shell; `tty` gives it a terminal of our size."""

    argv: tuple[str, ...]
    token: str
    cwd: str | None = None
    env: dict[str, str]
    user: str | None = None
    login: bool = True
    tty: bool = False
    detachable: bool = False

    def request(self) -> Request:
        size = terminal_size() if self.tty else None
        params: dict[str, Any] = {
            "argv": list(self.argv),
            "env": self.env,
            "login": self.login,
            "tty": {"rows": size[0], "cols": size[1]} if size else None,
        }
        if self.cwd is not None:
            params["cwd"] = self.cwd
        if self.user is not None:
            params["user"] = self.user
        return Request(
            version=PROTOCOL_VERSION,
            method="exec",
            params=msgspec.Raw(msgspec.json.encode(params)),
            token=self.token,
        )


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal on stdin or stdout; 24 by 80 when neither tells."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            packed = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
            rows, cols, _, _ = struct.unpack("HHHH", packed)
            if rows and cols:
                return rows, cols
    return 24, 80


def run(sock: socket.socket, process: Peer, *, machine: int | None = None) -> int:
    """Run a guest command to its end and return its exit status (128+n for signal n).

    Detaching returns `DETACHED`. `machine` is a pidfd of the VMM: its end is the connection's, even
    where the socket is silent.

    Raises:
        BangerError: the agent refused it; connection_lost: its fate is not known here.
    """
    sock.setblocking(True)
    decoder = FrameDecoder()
    try:
        sock.sendall(msgspec.json.encode(process.request()) + b"\n")
        rest = _read_reply(sock, machine)
    except OSError as e:
        raise BangerError("operation_failed", _NOT_TOLD, reason="connection_lost") from e
    with _signals(tty_mode=process.tty) as pending, _Terminal(enabled=process.tty) as terminal:
        session = _Session(
            sock,
            decoder,
            pending,
            rest,
            machine,
            terminal,
            tty_mode=process.tty,
            detachable=process.detachable,
        )
        if process.tty:
            # It may have changed before we listened for that, or have been another terminal's.
            session.send_size()
        return session.run()


def decoded(document: bytes, kind: type[T]) -> T:
    """What the agent said, checked: it is the guest's word."""
    try:
        return decode_json(document, type=kind)
    except MALFORMED as e:
        raise BangerError("operation_failed", f"the guest agent's answer is malformed: {e}") from e


def _read_reply(sock: socket.socket, machine: int | None) -> bytes:
    """Read the reply line; return what came behind it."""
    buffer = b""
    watched = [sock.fileno(), *([] if machine is None else [machine])]
    while b"\n" not in buffer:
        ready = select.select(watched, [], [])[0]
        data = sock.recv(_CHUNK) if sock.fileno() in ready else b""
        if not data or len(buffer) > (1 << 20):
            raise BangerError("operation_failed", _NOT_TOLD, reason="connection_lost")
        buffer += data
    line, _, rest = buffer.partition(b"\n")
    reply = decoded(line, Reply)
    if reply.error is not None:
        raise reply.error.exception()
    return rest


class _Terminal:
    """Our terminal: raw inside the context and as it was on every way out of it."""

    def __init__(self, *, enabled: bool) -> None:
        self._saved = termios.tcgetattr(0) if enabled and os.isatty(0) else None

    def __enter__(self) -> Self:
        try:
            self._make_raw()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def suspend(self) -> None:
        """Stop as SIGTSTP would have it; returns when we are continued."""
        self._restore()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, ours)
        self._make_raw()

    def _make_raw(self) -> None:
        if self._saved is not None:
            # At once, not with a flush: what was typed ahead is for the guest.
            tty.setraw(0, termios.TCSANOW)

    def _restore(self) -> None:
        if self._saved is not None:
            # At once: waiting for the output to drain would hang on a terminal stopped by Ctrl-S.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSANOW, self._saved)


class _Pending:
    """Signals that arrived, and the pipe that wakes the loop for them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.numbers: list[int] = []

    def take(self) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        taken, self.numbers = self.numbers, []
        return taken


@contextlib.contextmanager
def _signals(*, tty_mode: bool) -> Iterator[_Pending]:
    """Collect signals for forwarding while the context lasts."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    pending = _Pending(read)
    wanted = (*_FORWARDED, *_TERMINALS) if tty_mode else _FORWARDED
    old_handlers = {n: signal.signal(n, lambda s, _: pending.numbers.append(s)) for n in wanted}
    old_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield pending
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


class _Output:
    """One of our output descriptors and what waits to be written to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.waiting = bytearray()
        self.closed = False
        mode = os.fstat(fd).st_mode
        self._reopened = -1
        if stat.S_ISFIFO(mode):
            # A description of our own may be non-blocking; the shared one must stay as it is.
            with contextlib.suppress(OSError):
                self._reopened = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
        self._careful = self._reopened < 0 and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))

    def flush_some(self) -> None:
        """Write what the descriptor takes now. A reader that has gone drops the rest."""
        fd = self._reopened if self._reopened >= 0 else self.fd
        piece = self.waiting[: _PIPE_ATOMIC if self._careful else _CHUNK]
        try:
            written = os.write(fd, piece)
        except BlockingIOError:
            return
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                doing = "writing the output of the command"
                # Not with its cause: it is not banger that fills this disk, if it is one.
                raise BangerError("operation_failed", f"{doing}: {e.strerror}") from None
            self.closed = True
            self.waiting.clear()
            return
        del self.waiting[:written]

    def close(self) -> None:
        if self._reopened >= 0:
            os.close(self._reopened)


class _Session:
    def __init__(
        self,
        sock: socket.socket,
        decoder: FrameDecoder,
        pending: _Pending,
        rest: bytes,
        machine: int | None,
        terminal: _Terminal,
        *,
        tty_mode: bool,
        detachable: bool,
    ) -> None:
        self._sock = sock
        self._terminal = terminal
        self._detachable = detachable
        self._keys = detachable and os.isatty(0)
        self._decoder = decoder
        self._pending = pending
        self._rest = rest
        self._machine = machine
        self._tty = tty_mode
        self._credit = 256 << 10
        self._stdin_open = True
        self._stdout = _Output(1)
        self._stderr = _Output(2)
        self._sending = bytearray()
        self._interrupts: list[float] = []
        self._status: int | None = None

    def run(self) -> int:
        self._sock.setblocking(False)
        try:
            self._take(self._rest)
            while self._status is None or self._stdout.waiting or self._stderr.waiting:
                self._turn()
            return self._status
        finally:
            self._stdout.close()
            self._stderr.close()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._pending.fd, select.POLLIN)
        held = len(self._stdout.waiting) + len(self._stderr.waiting)
        events = (select.POLLIN if held < _HOLD else 0) | (select.POLLOUT if self._sending else 0)
        if self._status is None and events:
            poll.register(self._sock, events)
        if self._stdin_open and self._credit > 0 and not self._sending and self._status is None:
            poll.register(0, select.POLLIN)
        if self._machine is not None and self._status is None and events & select.POLLIN:
            poll.register(self._machine, select.POLLIN)
        for output in (self._stdout, self._stderr):
            if output.waiting:
                poll.register(output.fd, select.POLLOUT)
        ready = dict(poll.poll())
        if self._pending.fd in ready or self._pending.numbers:
            self._forward_signals()
        for output in (self._stdout, self._stderr):
            if output.fd in ready and output.waiting:
                output.flush_some()
        happened = ready.get(self._sock.fileno(), 0)
        if happened & select.POLLOUT:
            self._flush()
        if happened & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._receive()
        elif self._machine in ready:
            # Only after all that had arrived was read.
            raise BangerError("operation_failed", _NOT_TOLD, reason="connection_lost")
        if 0 in ready:
            self._read_stdin()

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            raise BangerError("operation_failed", _NOT_TOLD, reason="connection_lost")
        self._take(data)

    def _take(self, data: bytes) -> None:
        for kind, payload in self._decoder.feed(data):
            if kind is FrameType.STDOUT:
                self._emit(self._stdout, payload)
            elif kind is FrameType.STDERR:
                self._emit(self._stderr, payload)
            elif kind is FrameType.CREDIT:
                self._credit += int.from_bytes(payload[:4], "big")
            elif kind is FrameType.EXIT:
                self._status = _status_of(decoded(payload, dict[str, Any]))
            elif kind is FrameType.ERROR:
                raise decoded(payload, WireError).exception()

    def _emit(self, output: _Output, payload: bytes) -> None:
        if not output.closed:
            output.waiting += payload
        elif self._stdout.closed:
            # Nobody reads any more: the command hears of it as it would on the host.
            self._send(FrameType.SIGNAL, b'{"name":"HUP"}')

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, min(self._credit, _CHUNK))
        except OSError as e:
            # EIO: the terminal is gone, or we are in the background with no way to read.
            if e.errno != errno.EIO:
                raise
            data = b""
        if self._keys and _DETACH_KEY in data:
            data = data[: data.index(_DETACH_KEY)]
            self._detach()
        if data:
            self._credit -= len(data)
            self._send(FrameType.STDIN, data)
        elif self._status is None:
            self._stdin_open = False
            self._send(FrameType.STDIN_CLOSE)

    def _forward_signals(self) -> None:
        for number in self._pending.take():
            if number in _TERMINALS:
                if number == signal.SIGTSTP:
                    self._terminal.suspend()
                self.send_size()
                continue
            if self._detachable:
                self._detach()
                return
            if number == signal.SIGINT:
                now = time.monotonic()
                self._interrupts = [t for t in self._interrupts if now - t < _GIVE_UP_WITHIN_S]
                self._interrupts.append(now)
                if len(self._interrupts) >= _GIVE_UP_AFTER:
                    self._send(FrameType.SIGNAL, b'{"name":"KILL"}')
                    self._status = 130
                    # A reader that takes nothing must not keep us either.
                    self._stdout.waiting.clear()
                    self._stderr.waiting.clear()
                    return
            name = signal.Signals(number).name.removeprefix("SIG")
            self._send(FrameType.SIGNAL, msgspec.json.encode({"name": name}))

    def send_size(self) -> None:
        """Tell the size of our terminal."""
        rows, cols = terminal_size()
        self._send(FrameType.RESIZE, msgspec.json.encode({"rows": rows, "cols": cols}))

    def _detach(self) -> None:
        self._status = DETACHED
        # What a slow reader has not taken by now is in the session's log.
        self._stdout.waiting.clear()
        self._stderr.waiting.clear()

    def _send(self, kind: FrameType, payload: bytes = b"") -> None:
        self._sending += encode(kind, payload)
        self._flush()

    def _flush(self) -> None:
        while self._sending:
            try:
                sent = self._sock.send(self._sending)
            except BlockingIOError:
                return
            except ConnectionError:
                self._sending.clear()  # what the agent said last is still to be read
                return
            del self._sending[:sent]


def _status_of(exit_document: dict[str, Any]) -> int:
    if "signal" in exit_document:
        name = str(exit_document["signal"]).removeprefix("SIG")
        with contextlib.suppress(KeyError):
            return 128 + signal.Signals[f"SIG{name}"].value
        return 1
    return int(exit_document["code"]) & 0xFF


def interactive() -> bool:
    """Whether stdin and stdout are both terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()
