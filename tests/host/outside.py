"""The world around the host under test, in namespaces that end with the test: peers with a whole
network stack, so that what is proven is proven with connections."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import IO

from banger_root.validate import LeasePlan
from host.namespace import run, wait_for_carrier

_PUMP = Path(__file__).with_name("tap_pump.py")
WORLD = "198.51.100.9"
UPLINK = "198.51.100.1"


_PING = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.settimeout(0.2)
deadline = time.monotonic() + 120
while time.monotonic() < deadline:
    try:
        s.sendto(bytes((8, 0, 0xf7, 0xff, 0, 0, 0, 0)), (sys.argv[1], 0))
        if s.recvfrom(1500)[1][0] == sys.argv[1]:
            print("answered", flush=True)
            break
    except OSError:
        pass
"""


class Peer:
    """A network namespace that lives as long as its one process, which ends with us."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        self.pid = self._holder.pid
        self._children: list[subprocess.Popen[str]] = []

    @property
    def inside(self) -> str:
        """The beginning of a command that runs in the namespace."""
        return f"nsenter --net=/proc/{self.pid}/ns/net"

    def run(self, command: str) -> str:
        return run(f"{self.inside} {command}")

    def python(self, code: str, *words: str) -> subprocess.Popen[str]:
        """Run a program in the namespace, its streams piped; it is ended with the namespace."""
        child = subprocess.Popen(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", sys.executable, "-c", code, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        return child

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.communicate()
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


class World(Peer):
    """Everything behind the uplink `lan0`. It knows no way back to guests' own addresses."""

    def __init__(self, *, mtu: int = 1500) -> None:
        super().__init__()
        run(f"ip link add lan0 mtu {mtu} type veth peer name w0 mtu {mtu} netns {self.pid}")
        run(f"ip address add {UPLINK}/24 dev lan0")
        run("ip link set lan0 up")
        run(f"ip route add default via {WORLD} dev lan0")
        self.run(f"ip address add {WORLD}/24 dev w0")
        self.run("ip link set w0 up")
        wait_for_carrier("lan0")
        wait_for_carrier("w0", inside=self.inside)

    def close(self) -> None:
        # First: a namespace takes its links along when it ends, a little later.
        run("ip link delete lan0")
        super().close()


class StackGuest(Peer):
    """A guest with the kernel's own network stack behind its tap."""

    def __init__(self, plan: LeasePlan, tap: str) -> None:
        super().__init__()
        self._pump = subprocess.Popen(
            [sys.executable, str(_PUMP), tap, str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._pump.stdout is not None
        assert self._pump.stdout.readline() == b"ready\n"
        self.run(f"ip link set eth0 address {plan.mac}")
        self.run(f"ip address add {plan.address}/{plan.bridge.prefix} dev eth0")
        self.run("ip link set eth0 up")
        self.run(f"ip route add default via {plan.bridge.address}")
        # The kernel may take a second to let a port forward whose carrier has come up.
        pinger = self.python(_PING, str(plan.bridge.address))
        assert line_of(pinger.stdout) == "answered"

    def close(self) -> None:
        self._pump.kill()
        self._pump.communicate()
        super().close()


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")
