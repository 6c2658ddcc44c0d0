"""The helper as a service: a listening socket, and one forked child for each connection.

Children share nothing but the ledger, so a slow release holds nobody up and a crash ends one call.
This process has one thread and does no work of its own. On SIGTERM it stops listening and lets
each child finish the call that it is in; VMs are nobody's children here and stay.
Sources: unix(7), sd_notify(3), systemd.service(5), signal(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
from typing import TYPE_CHECKING

from banger_root import paths, process
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONNECTIONS_LIMIT = 32
# A peer that says nothing, or takes no answer, must not keep others out for ever.
IDLE_TIMEOUT_S = 60.0
_DIRECTORY_MODE = 0o711


def run_service(
    path: str,
    *,
    owner_uid: int,
    answer: Callable[[socket.socket], None],
    refuse: Callable[[socket.socket], bool],
    note: Callable[[HelperError], None],
) -> None:
    """Serve the socket at `path` until SIGTERM or SIGINT.

    `refuse` says whether a peer may not talk to us, and has told it so; `answer` serves one that
    may, in a process of its own; `note` logs a failure of this process.

    Raises:
        HelperError: the socket cannot be made where it should be.
    """
    with _wakened() as wakened, listen(path, owner_uid=owner_uid) as listener:
        _notify("READY=1")
        children: set[int] = set()
        ending = False
        while not ending or children:
            poll = select.poll()
            poll.register(wakened, select.POLLIN)
            if not ending and len(children) < CONNECTIONS_LIMIT:
                poll.register(listener, select.POLLIN)
            ready = [fd for fd, _ in poll.poll()]
            if wakened in ready:
                numbers = os.read(wakened, 4096)
                if not ending and {signal.SIGTERM, signal.SIGINT} & set(numbers):
                    ending = True
                    _notify("STOPPING=1")
                    _remove(path)
                    for pid in children:
                        # Not reaped yet, so this pid is nobody else's.
                        os.kill(pid, signal.SIGTERM)
            _reap(children)
            if listener.fileno() in ready and not ending:
                try:
                    _accept(listener, children, answer, refuse)
                except OSError as e:
                    note(HelperError("operation_failed", f"taking a connection: {e.strerror}"))


@contextlib.contextmanager
def listen(path: str, *, owner_uid: int) -> Iterator[socket.socket]:
    """A listening socket that the owner alone may connect to (0600), in a directory of root's.

    The directory is made where it is missing. A socket that nobody listens on is replaced.

    Raises:
        HelperError: the directory can be changed by others, somebody listens already, or something
            else has that name.
    """
    doing = f"listening on {path}"
    directory, name = os.path.split(path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
            os.chmod(directory, _DIRECTORY_MODE)
        fd = paths.open_directory(directory, trusted=True, sticky_ok=True)
    except OSError as e:
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if owner_uid != 0 and not mode & 0o001:
            raise HelperError(
                "operation_failed",
                f"{doing}: its directory has mode {mode:o}, so that the owner cannot reach it",
                hint=f"sudo chmod {_DIRECTORY_MODE:o} {directory}",
            )
        # Two that start at the same time must not both take the same socket for a stale one.
        fcntl.flock(fd, fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                _clear(fd, name, doing)
                before = os.umask(0o177)
                try:
                    # Through the descriptor, because sun_path has 108 bytes only.
                    listener.bind(f"/proc/self/fd/{fd}/{name}")
                finally:
                    os.umask(before)
                # Nobody can connect before it listens.
                os.chown(name, owner_uid, 0, dir_fd=fd, follow_symlinks=False)
                listener.listen(128)
            except OSError as e:
                raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
            listener.setblocking(False)
            fcntl.flock(fd, fcntl.LOCK_UN)
            yield listener
    finally:
        os.close(fd)


def _clear(directory: int, name: str, doing: str) -> None:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise HelperError("operation_failed", f"{doing}: something that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        try:
            s.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            os.unlink(name, dir_fd=directory)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise HelperError("already_exists", f"{doing}: another helper listens there", reason="in_use")


def _remove(path: str) -> None:
    # The directory is root's: this name is ours, or was replaced by another helper that is alive.
    with contextlib.suppress(OSError):
        os.unlink(path)


def _accept(
    listener: socket.socket,
    children: set[int],
    answer: Callable[[socket.socket], None],
    refuse: Callable[[socket.socket], bool],
) -> None:
    try:
        connection, _ = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return
    with connection:
        # A refusal is a line into an empty buffer: it does not block.
        connection.settimeout(IDLE_TIMEOUT_S)
        if refuse(connection):
            return
        children.add(process.fork(lambda: _live(listener, connection, answer)))


def _live(
    listener: socket.socket, connection: socket.socket, answer: Callable[[socket.socket], None]
) -> int:
    """The life of a child: one connection."""
    listener.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # To a terminal's Ctrl-C the listening process answers, by telling us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The call that runs is finished; to the next read the peer seems to have closed.
    signal.signal(signal.SIGTERM, lambda *_: _stop_reading(connection))
    # A peer that is silent for too long, or gone, is no failure of ours.
    with contextlib.suppress(TimeoutError, ConnectionError):
        answer(connection)
    return 0


def _stop_reading(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def _reap(children: set[int]) -> None:
    for pid in tuple(children):
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)


@contextlib.contextmanager
def _wakened() -> Iterator[int]:
    """A descriptor from which the numbers of arriving signals can be read."""
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(-1)
        for fd in (reading, writing):
            os.close(fd)


def _notify(state: str) -> None:
    """Tell the service manager, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        try:
            s.sendto(
                state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address
            )
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
