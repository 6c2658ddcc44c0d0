"""A banger of root's own beside the installed one, with its images; nothing of it stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.smoke.calls import Caller, banger, host, wait_until

ROOT = Path("/var/lib/smoke-user")
STATE = ROOT / "state" / "banger"
CONFIG = ROOT / "config" / "banger" / "config.toml"
BRIDGE = "br-fc-user"


def stop_daemon(user: Caller) -> None:
    """Let it end in order. It refuses while it is busy with what a client has left."""
    wait_until(lambda: user.done("daemon", "stop").status == 0, "the daemon to be idle and end")


@contextlib.contextmanager
def user_mode(**extra: str) -> Iterator[Caller]:
    """Calls in user mode as root; `extra` is more of their environment, and of their daemon's."""
    places = {
        "BANGER_MODE": "user",
        "XDG_STATE_HOME": str(ROOT / "state"),
        "XDG_CACHE_HOME": str(ROOT / "cache"),
        "XDG_CONFIG_HOME": str(ROOT / "config"),
        "XDG_RUNTIME_DIR": str(ROOT / "run"),
    }
    user = Caller(user="root", program=banger.program, extra={**places, **extra})
    for directory in (STATE, ROOT / "cache", CONFIG.parent, ROOT / "run"):
        directory.mkdir(parents=True, mode=0o700)
    for part in ("bin", "kernels", "images"):
        host("cp", "-a", f"/var/lib/banger/{part}", str(STATE))
    host("chown", "-R", "root:root", str(STATE))
    config = Path("/etc/banger/config.toml").read_text()
    CONFIG.write_text(
        f'bridge_name = "{BRIDGE}"\nbridge_ip = "172.31.77.1"\n'
        f'dns_listen_addr = "127.0.0.1:42070"\n{config}'
    )
    try:
        yield user
    finally:
        stop_daemon(user)
        host("ip", "link", "delete", BRIDGE, status=None)
        host("rm", "-rf", str(ROOT))
