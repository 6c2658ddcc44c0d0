"""docs/dns-routing.md: its dnsmasq lines, given to dnsmasq; and who is told which zones."""

from __future__ import annotations

import asyncio
import re
import shutil
from ipaddress import IPv4Network
from pathlib import Path

import dns.asyncquery
import dns.exception
import dns.message
import dns.rcode
import pytest

from banger.config.settings import Settings
from banger.dns.server import NameServer
from banger.dns.zone import Zone
from banger_root.resolver import reverse_zones
from fakes.loopback import free_port, own_address
from patience import PATIENCE_S

DOCUMENT = (Path(__file__).parents[2] / "docs" / "dns-routing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("prefix", range(8, 31))
def test_the_root_helper_allows_the_zones_that_we_serve(prefix: int) -> None:
    subnet = IPv4Network(f"172.16.0.0/{prefix}", strict=False)
    assert Zone(subnet).reverse_domains() == reverse_zones(subnet)


def test_the_document_has_the_default_address_and_zone() -> None:
    settings = Settings()
    host, port = settings.dns_listen_addr.rsplit(":", 1)
    assert f"dig @{host} -p {port} web.vm" in DOCUMENT
    (zone,) = Zone(settings.subnet).reverse_domains()
    assert f"server=/{zone}/{host}#{port}" in DOCUMENT


@pytest.mark.asyncio
async def test_dnsmasq_with_the_lines_of_the_document_finds_vms(tmp_path: Path) -> None:
    program = shutil.which("dnsmasq", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        pytest.skip("dnsmasq is not installed here")
    zone = Zone(Settings().subnet)
    zone.publish("web", "172.16.0.2")
    server = NameServer(zone)
    _, ours = await server.start("127.0.0.1:0")
    address = own_address()
    theirs = free_port(address)
    found = re.search(r"```dnsmasq\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    config = tmp_path / "banger.conf"
    config.write_text(found[1].replace("#42069", f"#{ours}"))
    process = await asyncio.create_subprocess_exec(
        program, "--keep-in-foreground", f"--conf-file={config}", "--no-resolv", "--no-hosts",
        "--stop-dns-rebind", f"--listen-address={address}", "--bind-interfaces", f"--port={theirs}",
        "--pid-file", "--user=",
    )  # fmt: skip

    async def ask(name: str, rtype: str = "A") -> dns.message.Message:
        query = dns.message.make_query(name, rtype)
        return await dns.asyncquery.udp(query, address, port=theirs, timeout=PATIENCE_S)

    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await dns.asyncquery.tcp(
                        dns.message.make_query("vm", "SOA"),
                        address,
                        port=theirs,
                        timeout=PATIENCE_S,
                    )
                except (ConnectionError, OSError):
                    await asyncio.sleep(0.01)  # it does not listen yet, which is told at once
                else:
                    break
        assert str((await ask("web.vm")).answer[0]).endswith("IN A 172.16.0.2")
        back = await ask("2.0.16.172.in-addr.arpa", "PTR")
        assert str(back.answer[0][0]) == "web.vm."
        assert (await ask("web.vm", "AAAA")).rcode() == dns.rcode.NOERROR
        assert (await ask("next.vm")).rcode() == dns.rcode.NXDOMAIN
        zone.publish("next", "172.16.0.3")
        assert (await ask("next.vm")).answer
    finally:
        process.terminate()
        await process.wait()
        await server.close()
