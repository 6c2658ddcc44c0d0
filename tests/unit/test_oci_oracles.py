"""Images that other tools made and stored, pulled by us and compared with what those tools unpack.

A real docker-registry on loopback, umoci, skopeo and buildah as makers, umoci as the judge of the
tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.oci.documents import guest_config
from banger.oci.layout import read_docker_archive, read_layout
from banger.oci.reference import RegistryReference, parse_reference
from banger.oci.registry import RegistrySource
from fakes.loopback import free_port, own_address
from oci_kit import describe, squash_image, umoci_unpack, unsquash
from patience import PATIENCE_S

TOOLS = ("docker-registry", "skopeo", "umoci", "unsquashfs")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to unpack owners and devices"),
]


def tool(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
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


@contextlib.contextmanager
def running_registry(root: Path, settings: str = "") -> Iterator[str]:
    """The address of a docker-registry on a free loopback port, until the block is left."""
    host = f"{own_address()}:{free_port(own_address())}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    config = root / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}}}}}\n"
        f"http: {{addr: '{host}'}}\n{settings}"
    )
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert server.poll() is None, (root / "log").read_text()
            try:
                direct.open(f"http://{host}/v2/", timeout=PATIENCE_S).close()
                break
            except urllib.error.HTTPError as e:
                e.close()
                break  # it wants a login
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # it tells nobody when it listens
        yield host
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


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


# "secret", by bcrypt, which is all that this registry takes.
HTPASSWD = "user:$2y$05$0BF6WcDvIBmdOjAdaBXzWeKmeTz/cOD5BE5XCANlx0Z0HQfBdofEy\n"


def test_a_registry_that_wants_a_login_gets_that_of_the_credential_helper(
    tmp_path: Path, layout: Path, judged: dict[bytes, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(HTPASSWD)
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        "#!/bin/sh\nread -r host\n"
        'echo "{\\"ServerURL\\":\\"$host\\",\\"Username\\":\\"user\\",\\"Secret\\":\\"secret\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"
    (tmp_path / "registry").mkdir()
    with running_registry(tmp_path / "registry", settings) as host:
        name = f"{host}/private/app:v1"
        tool("skopeo", "copy", "--dest-tls-verify=false", "--dest-creds", "user:secret",
             f"oci:{layout}:v1", f"docker://{name}")  # fmt: skip
        reference = parse_reference(name)
        assert isinstance(reference, RegistryReference)
        config = tmp_path / "config.json"
        blobs = tmp_path / "cache" / "blobs" / "sha256"

        def pull() -> None:
            with RegistrySource(reference, blobs=blobs, work=Job(), docker_config=config) as source:
                squash_image(source.fetch(), tmp_path / "x.sqfs")

        with pytest.raises(BangerError) as caught:
            pull()
        assert caught.value.code == "unauthorized"
        config.write_text(json.dumps({"credHelpers": {host: "test"}}))
        pull()
    assert describe(unsquash(tmp_path / "x.sqfs", tmp_path / "tree")) == judged


@pytest.mark.skipif(shutil.which("buildah") is None, reason="not installed: buildah")
@pytest.mark.parametrize("form", ["oci", "docker"])
def test_what_buildah_made_is_pulled_as_umoci_unpacks_it(
    tmp_path: Path, registry: str, form: str
) -> None:
    store = ("--storage-driver", "vfs", "--root", tmp_path / "s", "--runroot", tmp_path / "r")

    def buildah(*words: str | Path) -> None:
        tool("buildah", *store, *words)

    source = tmp_path / "files"
    (source / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", source / "bin" / "tool")
    (source / "bin" / "tool").chmod(0o4755)
    os.link(source / "bin" / "tool", source / "bin" / "same")
    (source / "sbin").symlink_to("bin")
    (source / "gone").write_text("soon")
    buildah("from", "--name", "c", "scratch")
    buildah("copy", "--chown", "7:8", "c", source, "/")
    buildah(
        "config", "--user", "7", "--workingdir", "/made", "--env", "A=b c", "--volume", "/v",
        "--entrypoint", '["/bin/tool"]', "--cmd", "x y", "--stop-signal", "SIGQUIT", "c",
    )  # fmt: skip
    buildah("commit", "--rm", "--format", form, "c", "base")
    # A second layer, with a whiteout in it.
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "new").write_text("new")
    buildah("from", "--name", "d", "base")
    mounted = subprocess.check_output(["buildah", *store, "mount", "d"], text=True).strip()
    (Path(mounted) / "gone").unlink()
    buildah("umount", "d")
    buildah("copy", "d", tmp_path / "build" / "new", "/sbin/new")
    buildah("commit", "--rm", "--format", form, "d", "top")
    name = f"{registry}/built/{form}:v1"
    buildah("push", "--tls-verify=false", "--format", "oci" if form == "oci" else "v2s2",
            "top", f"docker://{name}")  # fmt: skip
    judge = tmp_path / "judge"
    tool("skopeo", "copy", "--src-tls-verify=false", f"docker://{name}", f"oci:{judge}:v1")
    reference = parse_reference(name)
    assert isinstance(reference, RegistryReference)
    with RegistrySource(
        reference, blobs=tmp_path / "cache" / "blobs" / "sha256", work=Job()
    ) as pulled:
        image = pulled.fetch()
        squash_image(image, tmp_path / "x.sqfs")
    assert len(image.layers) == 2
    ours = describe(unsquash(tmp_path / "x.sqfs", tmp_path / "tree"))
    assert ours == describe(umoci_unpack(judge, tmp_path / "bundle", "v1"))
    assert b"gone" not in ours and b"bin/new" in ours
    config = guest_config(image.config, digest=image.digest, reference=name)
    assert (config.user, config.workdir, config.env[-1]) == ("7", "/made", "A=b c")
    assert (config.entrypoint, config.cmd) == (("/bin/tool",), ("x", "y"))
    assert (config.volumes, config.stop_signal) == (("/v",), "SIGQUIT")
