"""A program: one guest command over a connected agent, as `banger vm exec` runs it.

Its argument is a JSON document. The exit status is the command's; an error of banger's is 99, with
reason, code and message on stderr.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from banger.cli import stream
from banger.errors import BangerError


def main() -> int:
    document = json.loads(sys.argv[1])
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(document["socket"])
    machine = document.get("machine_pid")
    if "give_up_within_s" in document:
        stream._GIVE_UP_WITHIN_S = document["give_up_within_s"]
    process = stream.GuestProcess(
        argv=tuple(document["argv"]),
        token="a" * 64,
        env=document.get("env", {}),
        cwd=document.get("cwd"),
        user=document.get("user"),
        login=document.get("login", False),
        tty=document.get("tty", False),
    )
    try:
        return stream.run(sock, process, machine=os.pidfd_open(machine) if machine else None)
    except BangerError as e:
        sys.stderr.write(f"{e.reason} {e.code}: {e.message}\n")
        return 99


if __name__ == "__main__":
    sys.exit(main())
