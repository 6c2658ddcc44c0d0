"""The way that programs take to a VM's name: the host's own lookup, set up as documented.

In namespaces of the test's own, with a resolv.conf and an upstream server of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_S

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "dns-routing.md").read_text(encoding="utf-8")

# Run inside the namespaces: the recipe's two servers, then the host's own lookup.
INSIDE = """
import asyncio, ipaddress, socket, sys
from banger.dns.server import NameServer
from banger.dns.zone import Zone

async def main(ours, theirs):
    zone = Zone(ipaddress.IPv4Network("172.16.0.0/24"))
    zone.publish("web", "172.16.0.2")
    server = NameServer(zone)
    await server.start(f"{ours}:53")
    # The usual server: everything is 192.0.2.7.
    class Usual(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport
        def datagram_received(self, data, peer):
            end = data.index(0, 12) + 5
            answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\5\\0\\4" + socket.inet_aton("192.0.2.7")
            is_a = data[end - 4:end - 2] == b"\\0\\1"
            head = data[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if is_a else b"\\0\\0") + bytes(4)
            self.transport.sendto(head + data[12:end] + (answer if is_a else b""), peer)
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Usual, local_addr=(theirs, 53))

    async def getent(*words):
        p = await asyncio.create_subprocess_exec(
            "getent", *words, stdout=asyncio.subprocess.PIPE)
        out, _ = await p.communicate()
        return p.returncode, out.split()[:2]

    print(await getent("hosts", "web.vm"))
    print(await getent("hosts", "172.16.0.2"))
    print((await getent("ahosts", "WEB.vm"))[0])
    print(await getent("hosts", "nobody.vm"))
    print(await getent("hosts", "elsewhere.test"))
    zone.withdraw("web")
    print(await getent("hosts", "web.vm"))
    await server.close()
    print(await getent("hosts", "elsewhere.test"))

asyncio.run(main(*sys.argv[1:]))
"""


def test_the_plain_resolv_conf_of_the_documentation_finds_vms_and_everybody_else(
    tmp_path: Path, obstacle: str | None
) -> None:
    if obstacle:
        pytest.skip(obstacle)
    found = re.search(r"```resolv\.conf\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    ours, theirs = re.findall(r"nameserver (\S+)", found[1])
    assert f'dns_listen_addr = "{ours}:53"' in DOCUMENT
    (tmp_path / "resolv.conf").write_text(found[1])
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "inside.py").write_text(INSIDE)
    script = (
        "set -e; ip link set lo up; ip address add $4/32 dev lo; "
        "mount --bind $1/nsswitch.conf /etc/nsswitch.conf; "
        "mount --bind $1/resolv.conf $(readlink -f /etc/resolv.conf); "
        'exec "$2" $1/inside.py $3 $4'
    )
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", script, "sh", tmp_path, sys.executable,
         ours, theirs],
        # The resolver asks the next server when one takes longer than this (resolv.conf(5)).
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT / "src"),
             "RES_OPTIONS": "timeout:30"},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "(0, [b'172.16.0.2', b'web.vm'])",
        "(0, [b'172.16.0.2', b'web.vm'])",
        "0",
        "(2, [])",
        "(0, [b'192.0.2.7', b'elsewhere.test'])",
        "(2, [])",
        "(0, [b'192.0.2.7', b'elsewhere.test'])",
    ], done.stderr
