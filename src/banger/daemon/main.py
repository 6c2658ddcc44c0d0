"""The program `bangerd`: one daemon per owner.

In user mode the first command that needs it starts it; it holds a lock while it lives, so that two
first commands end up with one daemon. With `--system` it is the service of the system installation:
systemd starts it as the owner, hears when it is ready, and its log is the journal.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from pathlib import Path

from banger import __version__, faults
from banger.config.install import read_install_record
from banger.config.paths import Paths
from banger.config.system_paths import SYSTEM, SystemPaths
from banger.errors import BangerError, find_disk_full
from banger.files import ensure_private_directory


def main(system: SystemPaths = SYSTEM) -> None:
    """Run until asked to stop. Status 0: ended, or another daemon was there already."""
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"bangerd {__version__}\n")
        return
    os.umask(0o077)
    try:
        as_service = "--system" in sys.argv[1:]
        paths = _service_paths(system) if as_service else Paths.user_mode(system)
        ensure_private_directory(paths.runtime)
        # Held as long as we live: the kernel drops it, however we end.
        lock = os.open(paths.runtime / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            if not as_service:
                return
            raise BangerError(
                "operation_failed",
                f"another daemon holds {paths.runtime}",
                hint="systemctl status bangerd",
            ) from e
        _run(paths)
    except (BangerError, OSError) as e:
        error = find_disk_full(e, doing="starting") or e
        if not isinstance(error, BangerError):
            raise
        hint = f"hint: {error.hint}\n" if error.hint else ""
        sys.stderr.write(f"bangerd: {error}\n{hint}")
        raise SystemExit(1) from e


def _service_paths(system: SystemPaths) -> Paths:
    """The paths of the system installation, for its owner only.

    Raises:
        BangerError: there is none, or we are somebody else.
    """
    record = read_install_record(system)
    if record is None:
        raise BangerError(
            "not_found",
            f"there is no system installation: {system.record} is missing",
            hint="sudo banger system install --owner $USER",
        )
    if os.geteuid() != record.uid:
        raise BangerError(
            "unauthorized",
            f"the daemon of {record.owner} (uid {record.uid}) does not run as uid {os.geteuid()}",
            hint="sudo systemctl start bangerd",
        )
    return Paths.system_mode(system, Path(record.home))


def _run(paths: Paths) -> None:
    from banger.config.settings import read_settings
    from banger.daemon.daemon import Daemon
    from banger.daemon.handlers import build_methods
    from banger.daemon.log import start_logging
    from banger.rpc.operations import Operations
    from banger.rpc.server import Server
    from banger.system.notify import notify

    as_service = paths.mode == "system"
    level = os.environ.get("BANGER_LOG_LEVEL") or read_settings(*paths.config_files).log_level
    start_logging(None if as_service else paths.daemon_log, level)
    if not as_service:
        faults.arm_from_environment()

    async def serve() -> None:
        daemon = await Daemon.open(paths)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            notify("STOPPING=1")
            daemon.stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        server = Server(
            paths.daemon_socket,
            build_methods(daemon),
            owner_uid=os.geteuid(),
            version=__version__,
            state=paths.state,
            operations=Operations(paths.operations),
        )
        await daemon.run(server, _tell_systemd if as_service else _tell_ready)

    asyncio.run(serve())


def _tell_systemd() -> None:
    from banger.system.notify import notify

    notify("READY=1", f"STATUS=bangerd {__version__}")


def _tell_ready() -> None:
    """Wake the command that started us: it waits at the other end of this pipe."""
    if "--ready-fd" in sys.argv:
        fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
        os.write(fd, b"1")
        os.close(fd)


if __name__ == "__main__":
    main()
