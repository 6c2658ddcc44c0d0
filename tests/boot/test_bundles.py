"""What one installation publishes, another one boots, without building anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import IMAGE, KERNEL, SMALL, Installation
from fakes.signing import format_secret_key, make_key
from fakes.web import Web, serving

KEY = make_key()


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as web:
        yield web


@pytest.fixture
def reader(tmp_path_factory: pytest.TempPathFactory, web_server: Web) -> Iterator[Installation]:
    """An installation that has nothing and knows the address of an index and who signs it."""
    number = os.getpid() % 200
    installation = Installation(
        tmp_path_factory.mktemp("r"), bridge=f"br-fc-r{number}", address=f"10.214.{number}.1"
    )
    with installation.config.open("a") as f:
        f.write(f'index_url = "{web_server.url}/index.json"\nindex_keys = ["{KEY.public}"]\n')
    yield installation
    installation.close()


def test_a_vm_boots_from_published_bundles(
    banger: Installation, reader: Installation, web_server: Web, tmp_path: Path
) -> None:
    key = tmp_path / "signing.key"
    key.write_text(format_secret_key(KEY))
    index = web_server.root / "index.json"
    signed = ("--output", str(web_server.root), "--index", str(index), "--sign-key", str(key))
    banger.ok("kernel", "export", KERNEL, *signed)
    banger.ok("image", "export", IMAGE, *signed)
    checked = banger.ok("internal", "index-verify", str(index), "--key", str(KEY.public))
    assert checked.text.startswith("version 2,")

    available = reader.json("kernel", "list", "--available", "--json")
    assert (KERNEL, "available") in [(k["name"], k["state"]) for k in available]
    done = reader.ok("vm", "run", "--rm", "--image", IMAGE, *SMALL, "--", "cat", "/etc/os-release")
    assert "VERSION_CODENAME=bookworm" in done.text
    assert "its bundle from" in done.err
    assert "from its recipe" not in done.err
    assert reader.ok("image", "verify", IMAGE).text == f"{IMAGE} ok\n"
    assert reader.json("image", "show", IMAGE)["recipe"] == IMAGE
