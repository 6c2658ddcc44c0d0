"""The program `bangerd`: one daemon per owner, started by the first command that needs it.

It holds the start lock while it comes up, so that two first commands end up with one daemon.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys

from banger import __version__
from banger.config.paths import Paths
from banger.errors import BangerError
from banger.files import ensure_private_directory


def main() -> None:
    """Run until asked to stop. Status 0: ended, or another daemon was there already."""
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"bangerd {__version__}\n")
        return
    os.umask(0o077)
    paths = Paths.user_mode()
    try:
        ensure_private_directory(paths.runtime)
        # Held as long as we live: the kernel drops it, however we end.
        lock = os.open(paths.runtime / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _run(paths)
    except BangerError as e:
        sys.stderr.write(f"bangerd: {e}\n" + (f"hint: {e.hint}\n" if e.hint else ""))
        raise SystemExit(1) from e


def _run(paths: Paths) -> None:
    from banger.config.settings import read_settings
    from banger.daemon.daemon import Daemon
    from banger.daemon.handlers import build_methods
    from banger.daemon.log import start_logging
    from banger.rpc.server import Server

    level = os.environ.get("BANGER_LOG_LEVEL") or read_settings(paths.config_file).log_level
    start_logging(paths.daemon_log, level)

    async def serve() -> None:
        daemon = await Daemon.open(paths)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, daemon.stopping.set)
        server = Server(
            paths.daemon_socket,
            build_methods(daemon),
            owner_uid=os.geteuid(),
            version=__version__,
            state=paths.state,
        )
        await daemon.run(server, _tell_ready)

    asyncio.run(serve())


def _tell_ready() -> None:
    """Wake the command that started us: it waits at the other end of this pipe."""
    if "--ready-fd" in sys.argv:
        fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
        os.write(fd, b"1")
        os.close(fd)


if __name__ == "__main__":
    main()
