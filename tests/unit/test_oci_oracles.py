"""Images that other tools made and stored, pulled by us and compared with what those tools unpack.

A real docker-registry on loopback, umoci and skopeo as makers, umoci as the judge of the tree.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.oci.layout import read_docker_archive, read_layout
from banger.oci.reference import RegistryReference, parse_reference
from banger.oci.registry import RegistrySource
from oci_kit import describe, squash_image, umoci_unpack, unsquash

TOOLS = ("docker-registry", "skopeo", "umoci", "unsquashfs")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to unpack owners and devices"),
    pytest.mark.timeout(120),
]


def tool(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{argv}: {done.stderr}"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of three layers that umoci made from directories."""
    root = tmp_path_factory.mktemp("umoci")
    image = root / "layout"
    tool("umoci", "init", "--layout", image)
    tool("umoci", "new", "--image", f"{image}:v1")
    tool("umoci", "config", "--image", f"{image}:v1", "--config.user", "1000", "--config.env",
         "PATH=/opt/bin", "--config.cmd", "serve", "--config.workingdir", "/srv")  # fmt: skip

    def layer(change: str) -> None:
        bundle = root / "bundle"
        tool("umoci", "unpack", "--image", f"{image}:v1", bundle)
        tool("sh", "-ec", f"cd '{bundle / 'rootfs'}'; {change}")
        tool("umoci", "repack", "--image", f"{image}:v1", bundle)
        shutil.rmtree(bundle)

    layer(
        "mkdir -p usr/bin etc var/cache opt/deep/er dev; ln -s usr/bin bin; ln -s /etc/x abs;"
        "echo ID=umoci > etc/os-release; cp /bin/true usr/bin/tool; chmod 4711 usr/bin/tool;"
        "ln usr/bin/tool usr/bin/tool2; touch var/cache/a var/cache/b opt/deep/er/f;"
        "mknod dev/null c 1 3; mkfifo opt/pipe; chown 12:34 etc/os-release; "
        "truncate -s 1M opt/zero;"
        "setfattr -n user.note -v hello etc/os-release 2>/dev/null || true"
    )
    layer(
        "rm usr/bin/tool; rm -r opt/deep; rm -r var/cache; mkdir -m 700 var/cache;"
        "touch var/cache/c;"
        "rm abs; mkdir abs; echo new > bin/through; chmod 600 etc/os-release"
    )
    return image


@pytest.fixture(scope="module")
def judged(
    layout: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bytes, tuple[object, ...]]:
    return dict(describe(umoci_unpack(layout, tmp_path_factory.mktemp("judge") / "b", "v1")))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a docker-registry on a free loopback port."""
    root = tmp_path_factory.mktemp("registry")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{s.getsockname()[1]}"
    config = root / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}}}}}\n"
        f"http: {{addr: '{host}'}}\n"
    )
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, (root / "log").read_text()
            try:
                urllib.request.urlopen(f"http://{host}/v2/", timeout=10).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # it tells nobody when it listens
        yield host
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_what_was_pushed_is_pulled_as_umoci_unpacks_it(
    tmp_path: Path, layout: Path, registry: str, judged: dict[bytes, object], form: str
) -> None:
    name = f"{registry}/team/{form}:v1"
    tool("skopeo", "copy", "--dest-tls-verify=false", "--format", form,
         f"oci:{layout}:v1", f"docker://{name}")  # fmt: skip
    reference = parse_reference(name)
    assert isinstance(reference, RegistryReference)
    blobs = tmp_path / "cache" / "blobs" / "sha256"
    with RegistrySource(reference, blobs=blobs, work=Job()) as source:
        image = source.fetch()
        merged = squash_image(image, tmp_path / "x.sqfs")
    assert merged.distro == "umoci"
    assert image.config.config and image.config.config.cmd == ("serve",)
    inspected = subprocess.check_output(
        ["skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{name}"],
        text=True,
    )
    assert image.digest == inspected.strip()
    assert describe(unsquash(tmp_path / "x.sqfs", tmp_path / "tree")) == judged


def test_a_layout_directory_and_its_archive_are_the_same_image(
    tmp_path: Path, layout: Path, judged: dict[bytes, object]
) -> None:
    archive = tmp_path / "image.tar"
    tool("skopeo", "copy", f"oci:{layout}:v1", f"oci-archive:{archive}:v1")
    for number, path in enumerate((layout, archive)):
        squash_image(read_layout(path, "v1"), tmp_path / f"{number}.sqfs")
        assert describe(unsquash(tmp_path / f"{number}.sqfs", tmp_path / f"{number}")) == judged


def test_what_docker_save_would_write_is_the_same_image(
    tmp_path: Path, layout: Path, judged: dict[bytes, object]
) -> None:
    archive = tmp_path / "saved.tar"
    tool("skopeo", "copy", f"oci:{layout}:v1", f"docker-archive:{archive}:team/app:v1")
    image = read_docker_archive(archive, "v1")
    squash_image(image, tmp_path / "x.sqfs")
    assert describe(unsquash(tmp_path / "x.sqfs", tmp_path / "tree")) == judged
