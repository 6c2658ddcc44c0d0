"""Answers per second and latency of the name server, against dnsmasq with the same names.

    python -m tests.bench.dns [QUERIES] [ROUNDS]     a table; nothing of banger needs to run

Both serve on loopback, each in a process of its own; this process asks. With a window of queries
under way the server is what limits; with one at a time the figure is the time to an answer. Then
all share one processor, or the figure would be how long an idle one takes to wake up. The client is
Python and takes part in both sides' times, so the ratio is nearer to 1 than the servers are to each
other: `client` in the figure's parts says how quickly it asks a server that does nothing but send
back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from banger.dns import message as m
from tests.bench.measure import Figure, alternate, load

_NAMES = 50
_WINDOW = 32
# Times are kept in seconds with five digits: those of so many queries.
_PER = 10_000
_SUBNET = ipaddress.IPv4Network("172.16.0.0/24")
_ROOT = Path(__file__).resolve().parent.parent.parent
_REPLY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A name server that runs."""

    port: int
    pid: int


def hosts() -> dict[str, str]:
    return {f"vm-{i}": str(_SUBNET[i + 2]) for i in range(_NAMES)}


def queries() -> list[bytes]:
    """What hosts ask: names there are, their AAAA that is not, back from the address, a typo."""
    wanted: list[tuple[str, int]] = []
    for name, address in hosts().items():
        wanted += [
            (f"{name}.vm", m.A),
            (f"{name}.vm", m.AAAA),
            (ipaddress.ip_address(address).reverse_pointer, m.PTR),
            (f"no-{name}.vm", m.A),
        ]
    opt = m.opt_record(payload_bytes=1232)
    return [
        m.format_message(
            m.Message(
                id=0,
                flags=m.RD,
                questions=(m.Question(name=m.encode_name(name), rtype=rtype),),
                additional=(opt,),
            )
        )[2:]
        for name, rtype in wanted
    ]


def rate(port: int, count: int) -> float:
    """Seconds for `_PER` queries with a window of them under way, replies matched to queries."""
    bodies = queries()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(_REPLY_S)
        send, receive, pack = sock.send, sock.recv, struct.Struct("!H").pack
        under_way: set[bytes] = set()
        began = time.perf_counter()
        for i in range(count):
            ident = pack(i & 0xFFFF)
            under_way.add(ident)
            send(ident + bodies[i % len(bodies)])
            if len(under_way) >= _WINDOW:
                under_way.remove(receive(2048)[:2])
        while under_way:
            under_way.remove(receive(2048)[:2])
        return (time.perf_counter() - began) / count * _PER


def latency(port: int, count: int) -> float:
    """The median time from a query to its reply, one at a time, as seconds for `_PER` of them."""
    bodies = queries()
    taken = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(_REPLY_S)
        for i in range(count):
            query = struct.pack("!H", i & 0xFFFF) + bodies[i % len(bodies)]
            began = time.perf_counter()
            sock.send(query)
            reply = sock.recv(2048)
            taken.append(time.perf_counter() - began)
            if reply[:2] != query[:2]:
                raise RuntimeError("a reply to another query")
    return statistics.median(taken) * _PER


@contextlib.contextmanager
def dnsmasq(directory: Path) -> Iterator[Served]:
    """a dnsmasq with the same names; it ends with the context."""
    program = shutil.which("dnsmasq", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise RuntimeError("dnsmasq is not installed (Debian: dnsmasq-base)")
    port = _free_port()
    argv = [
        program, "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file",
        "--no-resolv", "--no-hosts", "--local=/vm/", "--local=/in-addr.arpa/", "--local-ttl=5",
        "--listen-address=127.0.0.1", "--bind-interfaces", f"--port={port}", "--user=root",
        *(f"--host-record={name}.vm,{address}" for name, address in hosts().items()),
    ]  # fmt: skip
    with _running(argv, directory / "dnsmasq.log", port) as pid:
        yield Served(port=port, pid=pid)


@contextlib.contextmanager
def banger(directory: Path) -> Iterator[Served]:
    """our name server, in a process of its own."""
    port = _free_port()
    argv = [sys.executable, "-m", "tests.bench.dns", "serve", str(port)]
    with _running(argv, directory / "banger.log", port) as pid:
        yield Served(port=port, pid=pid)


@contextlib.contextmanager
def echo(directory: Path) -> Iterator[Served]:
    """something that sends every datagram back, to know the client's own share."""
    port = _free_port()
    argv = [sys.executable, "-m", "tests.bench.dns", "echo", str(port)]
    with _running(argv, directory / "echo.log", port) as pid:
        yield Served(port=port, pid=pid)


@contextlib.contextmanager
def _running(argv: list[str], log: Path, port: int) -> Iterator[int]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        _wait_for_answer(process, log, port)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def _wait_for_answer(process: subprocess.Popen[bytes], log: Path, port: int) -> None:
    deadline = time.monotonic() + 20
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(0.2)
        while time.monotonic() < deadline and process.poll() is None:
            try:
                sock.send(b"\0\0" + queries()[0])
                sock.recv(2048)
            except ConnectionRefusedError:
                time.sleep(0.05)  # nobody is bound yet, which is told at once
            except TimeoutError:
                continue
            else:
                return
    raise RuntimeError(f"{process.args!r} does not answer:\n{log.read_text(errors='replace')}")


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def name_server(runs: int, count: int = 20_000) -> list[Figure]:
    """Both figures; `count` queries a run.

    Raises:
        RuntimeError: dnsmasq is not installed, or a server does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="dns-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        theirs = stack.enter_context(dnsmasq(directory))
        ours = stack.enter_context(banger(directory))
        nothing = stack.enter_context(echo(directory))

        everywhere = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, everywhere)
        processor = min(everywhere)
        measure: Callable[[int, int], float]
        figures = []
        for key, title, measure, number, aim in (
            ("dns_rate", f"{_PER} DNS queries, {_WINDOW} under way", rate, count, 0.5),
            ("dns_latency", f"{_PER} DNS queries, one at a time", latency, count // 4, 2.0),
        ):
            if measure is latency:
                for pid in (0, ours.pid, theirs.pid, nothing.pid):
                    os.sched_setaffinity(pid, {processor})
            before = load()
            a, b = alternate(
                runs, partial(measure, ours.port, number), partial(measure, theirs.port, number)
            )
            figures.append(
                Figure(
                    key=key,
                    title=title,
                    against="dnsmasq",
                    unit="s",
                    aim=aim,
                    ours=a,
                    theirs=b,
                    throughput=key == "dns_rate",
                    load=before,
                    parts={"client": measure(nothing.port, number)},
                )
            )
        return figures


async def _serve(port: int) -> None:
    from banger.dns.server import NameServer
    from banger.dns.zone import Zone

    zone = Zone(_SUBNET)
    zone.replace(hosts())
    await NameServer(zone).start(f"127.0.0.1:{port}")
    await asyncio.Event().wait()


def _echo(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", port))
        while True:
            data, peer = sock.recvfrom(2048)
            sock.sendto(data, peer)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["serve"]:
        asyncio.run(_serve(int(words[1])))
    elif words[:1] == ["echo"]:
        _echo(int(words[1]))
    else:
        count = int(words[0]) if words else 20_000
        for figure in name_server(int(words[1]) if len(words) > 1 else 7, count):
            ours, theirs, client = (
                x / _PER
                for x in (
                    statistics.median(figure.ours),
                    statistics.median(figure.theirs),
                    figure.parts["client"],
                )
            )
            print(
                f"{figure.title}: banger {1 / ours:,.0f}/s ({ours * 1e6:.1f} µs), "
                f"dnsmasq {1 / theirs:,.0f}/s ({theirs * 1e6:.1f} µs), "
                f"client alone {client * 1e6:.1f} µs: {figure.value:.2f} "
                f"({'met' if figure.met else 'missed'})"
            )


if __name__ == "__main__":
    main()
