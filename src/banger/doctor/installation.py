"""Checks of the installation: one version, the daemon, root's files, the two services."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from banger import __version__
from banger.config.system_paths import DAEMON_UNIT, HELPER_UNIT
from banger.doctor.check import Check, Finding, failed, passed, warned
from banger.doctor.trust import distrust

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.doctor.world import World

_INSTALL = "sudo banger system install --owner $USER"
_RESTART = "sudo banger system restart"
# What the helper runs on; the owner cannot write it (spec 3.3).
_PYTHON = Path("/usr/bin/python3")
# The protocol of the helper that this program speaks.
_HELPER_PROTOCOL = 1

# What keeps the services from harm: property → value, as `systemctl show` prints it (spec 3.3).
_PROPERTIES: dict[str, dict[str, str]] = {
    DAEMON_UNIT: {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "CapabilityBoundingSet": "",
        "UMask": "0077",
        "KillMode": "process",
        "RuntimeDirectoryPreserve": "yes",
    },
    HELPER_UNIT: {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "UMask": "0077",
        "RuntimeDirectoryPreserve": "yes",
    },
}


def _look_version(world: World) -> Iterator[Finding]:
    facts, helper, record = world.daemon().facts, world.helper(), world.record()
    other: list[str] = []
    if facts is not None and facts.version != __version__:
        other.append(f"the daemon is {facts.version}")
    if record is not None and record.version != __version__:
        other.append(f"installed is {record.version}")
    if helper.version is not None and helper.version != _HELPER_PROTOCOL:
        other.append(f"the root helper speaks protocol {helper.version}, not {_HELPER_PROTOCOL}")
    if not other:
        yield passed(f"banger {__version__}, Python {sys.version.split()[0]}")
    elif is_development():
        yield passed(f"banger {__version__}, a development checkout", *other)
    else:
        system = world.paths.mode == "system"
        installed_differs = record is not None and record.version != __version__
        restart = _INSTALL if installed_differs else _RESTART
        yield warned(
            f"this command is banger {__version__}: {'; '.join(other)}",
            command=restart if system else "banger daemon stop",
        )


def is_development() -> bool:
    """Whether this banger was built from no release."""
    try:
        from banger import _build  # type: ignore[attr-defined,unused-ignore] # noqa: F401
    except ImportError:
        return True
    return False


def _look_daemon(world: World) -> Iterator[Finding]:
    daemon = world.daemon()
    system = world.paths.mode == "system"
    if daemon.facts is not None:
        yield passed(f"the daemon answers at {world.paths.daemon_socket} (pid {daemon.facts.pid})")
    elif daemon.state == "absent" and not system:
        yield passed("the daemon does not run; the first command that needs it starts it")
    elif daemon.state == "absent":
        yield failed(
            f"the daemon does not run: nobody listens at {world.paths.daemon_socket}",
            f"its log: journalctl -u {DAEMON_UNIT}",
            command=_RESTART,
        )
    else:
        log = f"journalctl -n 50 -u {DAEMON_UNIT}" if system else f"cat {world.paths.daemon_log}"
        yield failed(
            f"the daemon at {world.paths.daemon_socket} does not answer: {daemon.problem}",
            f"its log: {log}",
            command=_RESTART if system else "banger daemon stop",
        )


def _look_files(world: World) -> Iterator[Finding]:
    if world.paths.mode == "user":
        why = distrust(_PYTHON)
        if why is not None and world.network == "bridge":
            yield failed(f"the root helper runs on {_PYTHON}: {why}", command=f"ls -l {_PYTHON}")
        else:
            yield passed("user mode: the root helper has the rights that you have, or sudo gives")
        return
    system = world.paths.system
    release = system.current.resolve()
    files = [
        system.record,
        release / "bin" / "banger",
        release / "bin" / "bangerd",
        release / "banger-root.pyz",
        *(release / "libexec").glob("*"),
        *(system.bin / name for name in ("banger", "bangerd")),
        *(system.units / unit for unit in (DAEMON_UNIT, HELPER_UNIT)),
        system.helper_state,
        _PYTHON,
    ]
    bad = [f"{path}: {why}" for path in files if (why := distrust(path)) is not None]
    if bad:
        yield failed(
            "root runs or reads what others than root can change, or what is missing",
            *bad,
            command=_INSTALL,
        )
    else:
        yield passed(f"{len(files)} installed files are root's alone, with every directory above")


def _look_units(world: World) -> Iterator[Finding]:
    for unit, wanted in _PROPERTIES.items():
        names = ["ActiveState", "SubState", "LoadState", "NeedDaemonReload", *wanted]
        text = world.ask("systemctl", "show", unit, f"--property={','.join(names)}")
        if text is None:
            yield failed(
                f"systemctl does not tell about {unit}", command=f"systemctl status {unit}"
            )
            continue
        found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        other = [
            f"{name} is {found.get(name, 'not set') or 'empty'}, installed was {value or 'empty'}"
            for name, value in wanted.items()
            if found.get(name, "") != value
        ]
        state = found.get("ActiveState", "unknown")
        if found.get("LoadState") != "loaded":
            yield failed(f"{unit} is not installed", command=_INSTALL)
        elif state != "active":
            yield failed(
                f"{unit} is {state} ({found.get('SubState', '?')})",
                f"its log: journalctl -n 50 -u {unit}",
                command=_RESTART,
            )
        elif found.get("NeedDaemonReload") == "yes":
            yield warned(
                f"{unit} was changed on disk since it was read",
                command=f"sudo systemctl daemon-reload && {_RESTART}",
            )
        elif other:
            yield warned(f"{unit} runs with other settings", *other, command=_INSTALL)
        else:
            yield passed(f"{unit} is active, with its restrictions")


CHECKS = (
    Check(
        name="version",
        look=_look_version,
        meaning="command, daemon, root helper and installation are one version; a development "
        "checkout is not warned of",
        mends="`banger daemon stop`; in system mode `sudo banger system restart`, or installing",
    ),
    Check(
        name="daemon",
        look=_look_daemon,
        meaning="whether the daemon answers; in user mode none needs to run",
        mends="`banger daemon stop`, so that the next command starts another; "
        "`sudo banger system restart`",
    ),
    Check(
        name="installed files",
        look=_look_files,
        meaning="what root runs or reads: every file, and every directory up to `/`, is root's "
        "alone",
        mends="installing again",
    ),
    Check(
        name="units",
        look=_look_units,
        needs=("system mode",),
        meaning="both services are active, and restricted as they were installed",
        mends="`sudo banger system restart`, or installing again",
    ),
)
