"""The line protocol of the helper: requests in, one at a time, one answer and one log line each.

The helper serves one connected socket and ends when its peer closes it; leases and VMs stay. It
holds nothing in memory that matters: killing it at any point loses no more than the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import time
from typing import Any

from banger_root import VERSION, process, tap, validate
from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.ledger import Ledger

_CHUNK = 64 << 10
_CAP_NET_ADMIN = 12


def main(arguments: list[str]) -> int:
    """Serve one connection, or with `--probe` print what this host lacks as one JSON line."""
    parser = argparse.ArgumentParser(prog="banger-root", allow_abbrev=False)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--owner-uid", type=int)
    parser.add_argument("--ledger")
    parser.add_argument("--fd", type=int)
    options = parser.parse_args(arguments)
    if options.probe:
        sys.stdout.write(json.dumps({"version": VERSION, "problems": find_problems()}) + "\n")
        return 0
    if options.owner_uid is None or options.ledger is None or options.fd is None:
        parser.error("--owner-uid, --ledger and --fd are required")
    os.umask(0o077)
    os.chdir("/")
    with socket.socket(fileno=options.fd) as connection:
        try:
            if not 0 <= options.owner_uid < 0xFFFFFFFF:
                raise HelperError("bad_request", "--owner-uid must be a uid")
            check_peer(connection, owner_uid=options.owner_uid)
            ledger = Ledger(options.ledger)
        except HelperError as e:
            # The peer learns why on its first line, as of any other refusal.
            connection.sendall(_encode({"error": _describe(e, "")}))
            return 1
        try:
            serve(connection, Leases(ledger, owner_uid=options.owner_uid))
        finally:
            ledger.close()
    return 0


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


def serve(connection: socket.socket, leases: Leases) -> None:
    """Answer requests until the peer closes."""
    buffer = bytearray()
    while True:
        end = buffer.find(b"\n")
        if end < 0:
            if len(buffer) > validate.LINE_LIMIT:
                # Where the next request begins is unknown, so this is the last answer.
                error = HelperError(
                    "bad_request", f"a request is longer than {validate.LINE_LIMIT} bytes"
                )
                connection.sendall(_encode({"error": _describe(error, "")}))
                return
            data = connection.recv(_CHUNK)
            if not data:
                return
            buffer += data
            continue
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        answer = answer_line(line, leases)
        try:
            connection.sendall(_encode(answer))
        except (BrokenPipeError, ConnectionResetError):
            return


def answer_line(line: bytes, leases: Leases) -> dict[str, Any]:
    """Carry out one request and log it; every failure becomes an error document."""
    started = time.monotonic()
    log: dict[str, Any] = {"time": time.time(), "op_id": "", "method": "", "lease": ""}
    try:
        request = validate.parse_request(line)
        log["op_id"], log["method"] = request.op_id, request.method
        result = _dispatch(request, leases, log)
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
        sys.stderr.write(json.dumps(log) + "\n")
        sys.stderr.flush()


def _dispatch(request: validate.Request, leases: Leases, log: dict[str, Any]) -> dict[str, Any]:
    if request.method == "prepare":
        plan = validate.parse_prepare(request.params)
        log["lease"] = plan.vm_id
        return leases.prepare(plan)
    if request.method == "release":
        log["lease"] = validate.parse_release(request.params)
        return leases.release(log["lease"])
    validate.parse_nothing(request.params)
    return leases.sweep() if request.method == "sweep" else leases.status()


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
