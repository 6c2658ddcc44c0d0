"""The line protocol of the helper: requests in, one at a time, one answer and one log line each.

The helper serves one connected socket (`--fd`) and ends when its peer closes it, or a listening one
(`--serve`) until it is told to stop; leases and VMs stay. It holds nothing in memory that matters:
killing it at any point loses no more than the answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

from banger_root import VERSION, fields, jail, process, resolver, tap, trust, validate
from banger_root.errors import HelperError
from banger_root.launch import Launcher, Site
from banger_root.leases import Leases
from banger_root.ledger import Ledger
from banger_root.service import run_service

BIN_DIR = "/var/lib/banger-root/bin"
_CHUNK = 64 << 10
_CAP_NET_ADMIN = 12


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the helper was started for; nothing of it can be changed by a peer."""

    owner_uid: int
    ledger: str
    site: Site | None
    """None where VMs are not launched by the helper (user mode)."""


def main(arguments: list[str]) -> int:
    """Serve, or with `--probe` print what this host lacks as one JSON line."""
    parser = argparse.ArgumentParser(prog="banger-root", allow_abbrev=False)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--fd", type=int)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--socket")
    parser.add_argument("--owner-uid", type=int)
    parser.add_argument("--ledger")
    parser.add_argument("--jail-base")
    parser.add_argument("--bin-dir", default=BIN_DIR)
    parser.add_argument("--state-root")
    parser.add_argument("--runtime-root")
    options = parser.parse_args(arguments)
    if options.probe:
        sys.stdout.write(json.dumps({"version": VERSION, "problems": find_problems()}) + "\n")
        return 0
    if options.owner_uid is None or options.ledger is None:
        parser.error("--owner-uid and --ledger are required")
    if options.serve == (options.fd is not None):
        parser.error("either --fd or --serve is required")
    if options.serve and options.socket is None:
        parser.error("--serve needs --socket")
    if options.jail_base and not (options.state_root and options.runtime_root):
        parser.error("--jail-base needs --state-root and --runtime-root")
    os.umask(0o077)
    os.chdir("/")
    setting = Setting(
        owner_uid=options.owner_uid,
        ledger=options.ledger,
        site=Site(
            jail_base=options.jail_base,
            bin_dir=options.bin_dir,
            roots=(options.state_root, options.runtime_root),
        )
        if options.jail_base
        else None,
    )
    if options.serve:
        return _serve_socket(options.socket, setting)
    with socket.socket(fileno=options.fd) as connection:
        try:
            _check_setting(setting)
            check_peer(connection, owner_uid=setting.owner_uid)
            ledger = Ledger(setting.ledger)
        except HelperError as e:
            # The peer learns why on its first line, as of any other refusal.
            connection.sendall(_encode({"error": _describe(e, "")}))
            return 1
        try:
            serve(connection, Servant(ledger, setting))
        finally:
            ledger.close()
    return 0


def _serve_socket(path: str, setting: Setting) -> int:
    def refuse(connection: socket.socket) -> bool:
        try:
            check_peer(connection, owner_uid=setting.owner_uid)
        except HelperError as e:
            _log({"result": e.code, "message": str(e)})
            with contextlib.suppress(OSError):
                connection.sendall(_encode({"error": _describe(e, "")}))
            return True
        return False

    def answer(connection: socket.socket) -> None:
        try:
            # Opened here: a lock belongs to an open file, and children must keep each other out.
            ledger = Ledger(setting.ledger)
        except HelperError as e:
            note(e)
            connection.sendall(_encode({"error": _describe(e, "")}))
            return
        serve(connection, Servant(ledger, setting))

    def note(error: HelperError) -> None:
        _log({"result": error.code, "message": str(error)})

    try:
        _check_setting(setting)
        if os.geteuid() != 0:
            raise HelperError("unauthorized", "the helper's service runs as root only")
        trust.check_helper()
        Ledger(setting.ledger).close()
        if setting.site is not None:
            jail.check_base(setting.site.jail_base, owner_uid=setting.owner_uid)
        run_service(path, owner_uid=setting.owner_uid, answer=answer, refuse=refuse, note=note)
    except HelperError as e:
        note(e)
        return 1
    return 0


def _check_setting(setting: Setting) -> None:
    if not 0 <= setting.owner_uid < 0xFFFFFFFF:
        raise HelperError("bad_request", "--owner-uid must be a uid")
    if setting.site is not None:
        site = setting.site
        for path in (site.jail_base, site.bin_dir, *site.roots):
            validate.parse_path(path, "a directory of the helper's own")


def find_problems() -> list[str]:
    """What is missing here to make a lease; empty when nothing is."""
    problems = []
    if os.geteuid() != 0:
        problems.append(f"the helper runs as uid {os.geteuid()}, not as root")
    if not _has_capability(_CAP_NET_ADMIN):
        problems.append("root has no CAP_NET_ADMIN here (a container?)")
    try:
        os.close(os.open(tap.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        problems.append(f"opening {tap.DEVICE}: {e.strerror}")
    if process.find_program("nft") is None:
        problems.append("the program nft is not installed (Debian package nftables)")
    return problems


def check_peer(connection: socket.socket, *, owner_uid: int) -> None:
    """Refuse a peer that is neither root nor the owner, by number (unix(7), SO_PEERCRED).

    Raises:
        HelperError: unauthorized.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("=iII", credentials)
    if uid not in (0, owner_uid):
        raise HelperError("unauthorized", f"uid {uid} may not talk to this helper")


class Servant:
    """What the helper does for one peer, on one open ledger."""

    def __init__(self, ledger: Ledger, setting: Setting) -> None:
        self.leases = Leases(
            ledger,
            owner_uid=setting.owner_uid,
            served=setting.site is not None,
            jail_base=setting.site.jail_base if setting.site else None,
        )
        self.launcher = (
            Launcher(ledger, setting.site, owner_uid=setting.owner_uid) if setting.site else None
        )


def serve(connection: socket.socket, servant: Servant) -> None:
    """Answer requests until the peer closes."""
    buffer = bytearray()
    while True:
        end = buffer.find(b"\n")
        if end < 0:
            if len(buffer) > fields.LINE_LIMIT:
                # Where the next request begins is unknown, so this is the last answer.
                error = HelperError(
                    "bad_request", f"a request is longer than {fields.LINE_LIMIT} bytes"
                )
                _log({"result": error.code, "message": str(error)})
                connection.sendall(_encode({"error": _describe(error, "")}))
                return
            data = connection.recv(_CHUNK)
            if not data:
                if buffer:
                    _log({"result": "bad_request", "message": "a request has no end"})
                return
            buffer += data
            continue
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        answer = answer_line(line, servant)
        try:
            connection.sendall(_encode(answer))
        except (BrokenPipeError, ConnectionResetError):
            return


def answer_line(line: bytes, servant: Servant) -> dict[str, Any]:
    """Carry out one request and log it; every failure becomes an error document."""
    started = time.monotonic()
    log: dict[str, Any] = {"op_id": "", "method": "", "lease": ""}
    try:
        request = validate.parse_request(line)
        log["op_id"], log["method"] = request.op_id, request.method
        result = _dispatch(request, servant, log)
        log["result"] = "ok"
        return {"result": result}
    except HelperError as e:
        log["result"], log["message"] = e.code, str(e)
        return {"error": _describe(e, log["op_id"])}
    except Exception as e:
        # A defect of ours or a host in a state nobody thought of: the next request gets its
        # chance all the same, and the log has the place.
        log["result"], log["message"] = "operation_failed", _locate(e)
        error = HelperError("operation_failed", f"{log['method']}: {type(e).__name__}: {e}")
        return {"error": _describe(error, log["op_id"])}
    finally:
        log["duration_ms"] = round((time.monotonic() - started) * 1000, 1)
        _log(log)


def _log(known: dict[str, Any]) -> None:
    record = {"time": time.time(), "op_id": "", "method": "", "lease": "", **known}
    # One write, so that lines of several children do not mix.
    with contextlib.suppress(OSError):
        os.write(2, json.dumps(record).encode() + b"\n")


def _dispatch(request: validate.Request, servant: Servant, log: dict[str, Any]) -> dict[str, Any]:
    leases, launcher = servant.leases, servant.launcher
    if request.method == "prepare":
        plan = validate.parse_prepare(request.params)
        log["lease"] = plan.vm_id
        return leases.prepare(plan)
    if request.method == "release":
        log["lease"] = validate.parse_release(request.params)
        return leases.release(log["lease"])
    if request.method == "launch":
        launch = validate.parse_launch(request.params)
        log["lease"] = launch.lease_id
        return _get(launcher).launch(launch)
    if request.method == "signal":
        wanted = validate.parse_signal(request.params)
        log["lease"] = wanted.lease_id
        return _get(launcher).signal(wanted.lease_id, wanted.name)
    if request.method == "sweep":
        return leases.sweep(validate.parse_sweep(request.params))
    if request.method == "resolver":
        return resolver.set_resolver(validate.parse_resolver(request.params))
    validate.parse_nothing(request.params)
    return leases.status()


def _get(launcher: Launcher | None) -> Launcher:
    if launcher is None:
        raise HelperError(
            "operation_failed", "this helper launches no VMs: it has no jails", reason="unsupported"
        )
    return launcher


def _describe(error: HelperError, op_id: str) -> dict[str, Any]:
    document = {"code": error.code, "message": str(error), "op_id": op_id}
    if error.hint is not None:
        document["hint"] = error.hint
    if error.reason is not None:
        document["reason"] = error.reason
    return document


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _locate(error: Exception) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def _has_capability(number: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
