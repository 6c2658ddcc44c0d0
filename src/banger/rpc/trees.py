"""Files of a guest for code that runs in a thread: list, fetch, place, and run a program on them.

A `GuestFiles` makes one connection for each exchange and holds none between; several threads may
use it. `cancel` ends what is under way and refuses more. The guest is hostile: what it says is
capped and checked here or by whoever gets the bytes.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from banger.api.base import Wire
from banger.api.envelope import WireError
from banger.decoding import convert
from banger.errors import BangerError
from banger.rpc.blocking import BlockingChannel
from banger.rpc.channel import connection_lost, decode_reply
from banger.rpc.data import DataReader, DataWriter, decode
from banger.rpc.frames import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.api.envelope import Request

T = TypeVar("T")

MAX_ENTRIES = 2_000_000
"""How many files of one guest are listed."""
MAX_NAME = 4095
"""How long the name of one may be, in bytes, and all names together."""
MAX_NAME_BYTES = 256 << 20
# A component that is empty or leads elsewhere; NUL, which ends names where they are lists.
_ODD_NAME = re.compile(rb"(?:\A|/)\.{0,2}(?:/|\Z)|\0")
_ENTRY = struct.Struct("<IQQQQH")
_RECORD = struct.Struct("<QQQ")
_STDERR = 4096
_STDIN_CREDIT = 256 << 10


class Transferred(Wire, frozen=True, kw_only=True):
    """What a put or get moved."""

    files: int
    bytes: int


class Record(NamedTuple):
    """Inode and times (ns) of a file. While they and its size stay, so does its content."""

    ino: int
    mtime_ns: int
    ctime_ns: int

    @property
    def precise(self) -> bool:
        """Whether the filesystem keeps parts of a second; else two changes may look like one."""
        return self.ctime_ns % 1_000_000_000 != 0


class Entry(NamedTuple):
    """One name below a scanned directory. `mode` is `st_mode`."""

    mode: int
    size: int
    record: Record


class PathFacts(Wire, frozen=True, kw_only=True):
    """What a path in the guest leads to, links followed."""

    kind: str
    path: str
    size: int
    mode: int


_Word = Annotated[str, msgspec.Meta(max_length=128, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class GuestSystem(Wire, frozen=True, kw_only=True):
    """What the guest's os-release says, and the package manager that goes with it, if any."""

    id: _Word
    manager: _Word


class GuestFiles:
    """The files of one guest. `connect` gives a new, blocking connection to its agent; `request`
    builds the request of a method and its parameters, with the VM's token."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        request: Callable[[str, dict[str, Any]], Request],
    ) -> None:
        self._connect = connect
        self._request = request
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        self._cancelled = False
        self._unreached: BangerError | None = None

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """From another thread: exchanges under way fail at their next step."""
        with self._guard:
            self._cancelled = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def exchange(
        self, method: str, params: dict[str, Any], doing: str, *, streams: bool = True
    ) -> Iterator[BlockingChannel]:
        """A connection on which a method was called and, where it `streams`, has begun to answer.

        Raises:
            BangerError: the agent's own error; connection_lost; cancelled.
        """
        try:
            sock = self._connect()
        except BangerError as e:
            self._unreached = e
            raise
        sock.setblocking(True)
        with self._guard:
            self._open.add(sock)
            cancelled = self._cancelled
        try:
            if cancelled:
                raise BangerError("operation_failed", f"{doing}: cancelled", reason="cancelled")
            channel = BlockingChannel(sock)
            channel.write_document(self._request(method, params))
            if streams:
                decode_reply(channel.read_line(), doing)
            yield channel
        except ConnectionError as e:
            raise connection_lost(doing) from e
        finally:
            with self._guard:
                self._open.discard(sock)
            sock.close()

    def is_absent(self, error: BangerError) -> bool:
        """Whether the agent says that a path is not there; the VM may not be there either."""
        return error.code == "not_found" and error is not self._unreached

    def call(self, method: str, params: dict[str, Any], doing: str) -> Any:
        """A method with one result, which is for the caller to check.

        Raises:
            BangerError: the agent's own error; connection_lost; cancelled.
        """
        with self.exchange(method, params, doing, streams=False) as channel:
            return decode_reply(channel.read_line(), doing).result

    def stat(self, path: str) -> PathFacts | None:
        """What a path leads to; None when nothing is there."""
        doing = f"looking at {path} in the guest"
        try:
            return convert(self.call("stat", {"path": path}, doing), type=PathFacts)
        except BangerError as e:
            if self.is_absent(e):
                return None
            raise
        except msgspec.ValidationError as e:
            raise BangerError("operation_failed", f"{doing}: malformed answer: {e}") from e

    def scan(self, path: str, *, inside_git: bool = False) -> dict[bytes, Entry] | None:
        """Everything below a directory, without the inside of `.git` directories unless that is
        asked for; None when the directory is not there.

        Raises:
            BangerError: it cannot be read; more than `MAX_ENTRIES` entries or `MAX_NAME_BYTES`, or
                a malformed one.
        """
        doing = f"listing {path} in the guest"
        found: dict[bytes, Entry] = {}
        try:
            with self.exchange("scan", {"path": path, "git": inside_git}, doing) as channel:
                data = DataReader(channel, doing)
                rest, room = b"", MAX_NAME_BYTES
                while (chunk := data.next_chunk()) is not None:
                    rest, used = _parse_entries(rest + chunk, found, doing)
                    room -= used
                    if room < 0:
                        raise BangerError("operation_failed", f"{doing}: its names have no end")
                data.finish(Transferred)
        except BangerError as e:
            if self.is_absent(e):
                return None
            raise
        if rest:
            raise BangerError("operation_failed", f"{doing}: the answer is cut")
        return found

    def get(
        self,
        path: str,
        names: list[bytes] | None,
        receive: Callable[[BinaryIO], T],
        *,
        inverted: bool = False,
    ) -> T:
        """What `receive` makes of a tar of `path`, or of some names below it; `inverted`: of all
        but these files, other names of which are links to them."""
        doing = f"fetching files of {path} from the guest"
        params: dict[str, Any] = {
            "path": path,
            "names": names is not None and not inverted,
            "except": names is not None and inverted,
        }
        with self.exchange("get", params, doing) as channel:
            if names is not None:
                with DataWriter(channel).buffered() as out:
                    out.writelines(n + b"\0" for n in names)
                channel.write_frame(FrameType.DATA_END)
            data = DataReader(channel, doing)
            received = receive(data.buffered())
            data.finish(Transferred)
            return received

    def put(
        self, path: str, write: Callable[[BinaryIO], T], *, mode: str
    ) -> tuple[T, Transferred, tuple[Record, ...]]:
        """Send one tar that `write` writes. Returns also a record of each counted member.

        Raises:
            BangerError: the agent's own error; the tree in the guest is then as it was, but for a
                merge.
        """
        doing = f"copying files to {path} in the guest"
        params = {"path": path, "mode": mode, "owner": None, "report": True}
        with self.exchange("put", params, doing) as channel:
            data = DataReader(channel, doing)
            try:
                with DataWriter(channel).buffered() as out:
                    written = write(out)
                channel.write_frame(FrameType.DATA_END)
            except ConnectionError:
                # The agent gave up; its last frame says why.
                data.finish(Transferred)
                raise
            report = bytearray()
            while (chunk := data.next_chunk()) is not None:
                report += chunk
                if len(report) > _RECORD.size * MAX_ENTRIES:
                    raise BangerError("operation_failed", f"{doing}: the report has no end")
            transferred = data.finish(Transferred)
        if len(report) != _RECORD.size * transferred.files:
            raise BangerError("operation_failed", f"{doing}: the report is cut")
        return written, transferred, tuple(map(Record._make, _RECORD.iter_unpack(report)))

    def system(self) -> GuestSystem:
        """Which distribution this is, and its package manager."""
        doing = "asking the guest for its distribution"
        result = self.call("packages", {}, doing)
        try:
            return convert(result, type=GuestSystem)
        except msgspec.ValidationError as e:
            raise BangerError("operation_failed", f"{doing}: malformed answer: {e}") from e

    def capture(
        self,
        exclude: tuple[str, ...],
        enter: tuple[str, ...],
        receive: Callable[[Iterator[bytes]], T],
        *,
        grace_s: float,
        path: str = "/",
    ) -> T:
        """What `receive` makes of the tar of the whole system, whose services are stopped first."""
        doing = "reading the guest's system"
        params = {
            "path": path, "exclude": list(exclude), "enter": list(enter), "grace_s": grace_s,
        }  # fmt: skip
        with self.exchange("capture", params, doing) as channel:
            data = DataReader(channel, doing)
            received = receive(iter(data.next_chunk, None))
            data.finish(Transferred)
            return received

    def install(self, packages: list[str], out: Callable[[bytes], object]) -> int:
        """Install packages with the guest's own manager; its exit status. `out` gets what it
        says."""
        doing = "installing packages in the guest"
        return self._command("install", {"packages": packages}, doing, b"", out, out)

    def run(
        self,
        argv: list[str],
        *,
        cwd: str | None,
        stdin: bytes,
        out: Callable[[bytes], object],
        err: Callable[[bytes], object] | None = None,
    ) -> tuple[int, str]:
        """Run a program as the guest's root: its status and the end of what it said on stderr.

        `out` gets stdout as it comes and may raise to end the program, `err` stderr. A signal
        counts as 128.
        """
        words = b""

        def hear(piece: bytes) -> None:
            nonlocal words
            words = (words + piece)[-_STDERR:]
            if err is not None:
                err(piece)

        params = {
            "argv": argv, "cwd": cwd, "env": {"LC_ALL": "C.UTF-8"}, "user": "root", "tty": None,
            "login": False,
        }  # fmt: skip
        status = self._command("exec", params, f"running {argv[0]} in the guest", stdin, out, hear)
        return status, words.decode(errors="replace").strip()

    def _command(
        self,
        method: str,
        params: dict[str, Any],
        doing: str,
        stdin: bytes,
        out: Callable[[bytes], object],
        err: Callable[[bytes], object],
    ) -> int:
        with self.exchange(method, params, doing) as channel:
            waiting = memoryview(stdin)
            credit, open_ = _STDIN_CREDIT, True
            while True:
                while waiting and credit:
                    piece = waiting[: min(credit, 64 << 10)]
                    channel.write_frame(FrameType.STDIN, bytes(piece))
                    credit -= len(piece)
                    waiting = waiting[len(piece) :]
                if not waiting and open_:
                    channel.write_frame(FrameType.STDIN_CLOSE)
                    open_ = False
                frame = channel.read_frame()
                if frame is None:
                    raise connection_lost(doing)
                kind, payload = frame
                if kind is FrameType.STDOUT:
                    out(payload)
                elif kind is FrameType.STDERR:
                    err(payload)
                elif kind is FrameType.CREDIT:
                    credit += int.from_bytes(payload[:4], "big")
                elif kind is FrameType.EXIT:
                    status = decode(payload, dict[str, Any], doing).get("code")
                    return status if isinstance(status, int) else 128
                elif kind is FrameType.ERROR:
                    raise decode(payload, WireError, doing).exception()


def _parse_entries(data: bytes, found: dict[bytes, Entry], doing: str) -> tuple[bytes, int]:
    """Take whole entries off the front of `data`; return what is left, and the length of their
    names."""
    at, end, fixed = 0, len(data), _ENTRY.size
    used = 0
    unpack = _ENTRY.unpack_from
    while at + fixed <= end:
        mode, size, ino, mtime, ctime, length = unpack(data, at)
        start = at + fixed
        if start + length > end:
            break
        name = data[start : start + length]
        if not 0 < length <= MAX_NAME or name in found or len(found) >= MAX_ENTRIES:
            raise BangerError(
                "operation_failed",
                f"{doing}: more than {MAX_ENTRIES} names, or one that is twice there",
            )
        if _ODD_NAME.search(name):
            raise BangerError("operation_failed", f"{doing}: a name that no directory holds")
        found[name] = Entry(mode, size, Record(ino, mtime, ctime))
        at = start + length
        used += length
    return data[at:], used
