"""Container images as VMs: with systemd, without any init, with one program and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.setup import go_environment

from boot.installation import PATIENCE_S, SMALL, Installation
from fakes.registry import fake_registry
from oci_kit import Entry, Image, build_image, layer_tar, whiteout, write_archive, write_layout

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="squashfs-tools is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to unpack the image's owners"),
]

HELLO = b"#!/bin/sh\necho $GREETING from $(id -un) in $(pwd): $@\n"


@pytest.fixture(scope="module")
def debian(banger: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """A Debian with systemd, as one layer."""
    root = tmp_path_factory.mktemp("debian")
    recipe = str(Path(__file__).parent / "systemd.toml")
    banger.ok("image", "build", "--name", "systemd", "--recipe", recipe, timeout_s=900)
    rootfs = banger.json("image", "show", "systemd")["rootfs_path"]
    tree = root / "tree"
    subprocess.run(["unsquashfs", "-n", "-q", "-d", tree, rootfs], check=True)
    yield subprocess.run(
        ["tar", "-c", "--numeric-owner", "--xattrs", "-C", tree, "."],
        check=True,
        capture_output=True,
    ).stdout
    banger.ok("image", "delete", "systemd")


def archive(root: Path, image: Image) -> str:
    return f"oci-archive:{write_archive(root / 'image.tar', write_layout(root / 'layout', image))}"


@pytest.mark.usefixtures("cleaned")
def test_an_image_with_systemd_boots_into_it(
    banger: Installation, debian: bytes, tmp_path: Path
) -> None:
    reference = archive(tmp_path, build_image([debian]))
    # Until its socket is there, systemctl cannot even wait.
    script = """cat /proc/1/comm
until said=$(systemctl is-system-running --wait) || [ "$said" = degraded ]; do sleep 0.2; done
echo $said; systemctl --failed --no-legend"""
    done = banger("vm", "run", "--rm", *SMALL, "--image", reference, "--", "sh", "-c", script)
    assert done.text.split() == ["systemd", "running"], done.err + banger.evidence()


@pytest.mark.usefixtures("cleaned")
def test_an_image_without_an_init_is_run_as_its_configuration_says(
    banger: Installation, debian: bytes, tmp_path: Path
) -> None:
    gone = [whiteout(p) for p in ("usr/lib/systemd", "usr/sbin/init")]
    top = layer_tar([*gone, Entry("usr/local/bin/hello", content=HELLO, mode=0o755)])
    config = {
        "User": "daemon",
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "GREETING=hi"],
        "WorkingDir": "/srv/made/here",
        "Entrypoint": ["hello"],
        "Volumes": {"/data/volume": {}},
    }
    reference = archive(tmp_path, build_image([debian, top], config=config))
    done = banger(
        "vm", "run", "--name", "bare", *SMALL, "--image", reference, "--", "a", "b"
    )  # fmt: skip
    assert done.out == b"hi from daemon in /srv/made/here: a b\n", done.err + banger.evidence()
    table = {
        (): "daemon /srv/made/here hi /usr/sbin",
        ("--user", "root"): "root /srv/made/here hi /root",
        ("--user", "12345"): "12345 /srv/made/here hi /",
        ("--env", "GREETING=ho"): "daemon /srv/made/here ho /usr/sbin",
        ("--guest-path", "/tmp"): "daemon /tmp hi /usr/sbin",
    }
    script = 'echo "$(id -un 2>/dev/null || id -u) $(pwd) $GREETING $HOME"'
    for options, expected in table.items():
        said = banger.ok("vm", "exec", *options, "bare", "--", "sh", "-c", script).text
        # An id without a name: id prints the number and fails.
        assert said.split()[-4:] == expected.split(), options
    said = banger.ok("vm", "exec", "bare", "--", "sh", "-c", "cat /proc/1/comm; ls -d /data/volume")
    assert said.text.split() == ["banger-agent", "/data/volume"]
    assert banger("vm", "exec", "bare", "--", "hello", "x").text.endswith(": x\n")
    assert banger("vm", "exec", "bare", "--", "nothing-here").status == 127
    banger.ok("vm", "delete", "bare")


@pytest.mark.usefixtures("cleaned")
def test_an_image_of_one_program_is_pulled_and_run(banger: Installation, tmp_path: Path) -> None:
    here = Path(__file__).parent / "scratch"
    tool = tmp_path / "tool"
    environment = {**os.environ, **go_environment(), "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
    subprocess.run(["go", "build", "-o", tool, "."], cwd=here, env=environment, check=True)
    image = build_image(
        [layer_tar([Entry("tool", content=tool.read_bytes(), mode=0o755)])],
        config={"User": "1000:1001", "Entrypoint": ["/tool"], "Cmd": ["by", "default"]},
    )
    with fake_registry() as registry:
        registry.add(image, "v1")
        reference = f"{registry.host}/one/program:v1"
        run = ("vm", "run", "--rm", "-q", *SMALL, "--image", reference)
        done = banger(*run, "--default-command")
        assert done.status == 0, done.err + banger.evidence()
        said = json.loads(done.out)
        assert (said["argv"], said["uid"], said["gid"]) == (["/tool", "by", "default"], 1000, 1001)
        assert (said["cwd"], said["home"], said["passwd"]) == ("/", "/", False)
        registry.asked.clear()
        done = banger(*run, "--", "fail")
        assert (done.status, registry.asked) == (42, [])
    assert banger.json("image", "show", "program-v1")["oci"]["cmd"] == ["by", "default"]


@pytest.mark.parametrize("moment", ["fetching", "reading", "writing the image"])
@pytest.mark.usefixtures("cleaned")
def test_ctrl_c_at_any_moment_of_a_pull_leaves_nothing(banger: Installation, moment: str) -> None:
    content = os.urandom(1 << 20)
    layers = [layer_tar([Entry(f"f{n}-{i}", content=content) for i in range(40)]) for n in (1, 2)]
    with fake_registry() as registry:
        image = build_image(layers, compression="none")
        registry.add(image, moment.split()[0])
        if moment == "fetching":
            registry.hold = threading.Event()
        reference = f"{registry.host}/ctrl/c:{moment.split()[0]}"
        before = len(banger.json("image", "list", "--json"))
        with banger.popen("image", "pull", reference, text=True) as pull:
            assert pull.stderr
            said = []
            for line in pull.stderr:
                said.append(line)
                if moment in line:
                    if registry.hold is not None:
                        assert registry.holding.wait(PATIENCE_S)
                    pull.send_signal(signal.SIGINT)
            assert pull.wait(PATIENCE_S) == 130, said
        # The command has ended when it heard so; the daemon gives everything back at once.
        deadline = time.monotonic() + PATIENCE_S
        while left := [*pull_programs(banger), *pull_files(banger)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        assert len(banger.json("image", "list", "--json")) == before
        if registry.hold is not None:
            registry.hold.set()
        banger.ok("image", "pull", reference)
    for digest in image.blobs:
        (blobs_of(banger) / digest.removeprefix("sha256:")).unlink(missing_ok=True)


def blobs_of(banger: Installation) -> Path:
    return Path(banger.env["XDG_CACHE_HOME"]) / "banger" / "oci" / "blobs" / "sha256"


def pull_files(banger: Installation) -> list[str]:
    return [p.name for p in (banger.state / "images").glob(".pull-*") if p.is_dir()]


def pull_programs(banger: Installation) -> list[str]:
    """What the daemon has started for a pull."""
    daemon = banger.daemon_pid()
    children = Path(f"/proc/{daemon}/task").glob("*/children")
    pids = [pid for path in children for pid in path.read_text().split()]
    names = [Path(f"/proc/{pid}/comm") for pid in pids]
    return [name for p in names if p.exists() and (name := p.read_text().strip()) == "sqfstar"]
