"""Images made in a machine of another image; and what is left when that fails."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from boot.installation import IMAGE, KERNEL, PATIENCE_S, SMALL, Installation

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="squashfs-tools is missing"),
]

FURNISH = r"""
echo "furnishing $(hostname)"
printf 'of the build\n' > /root/notes
mkdir -p /opt/odd/empty
chmod 1777 /opt/odd/empty
printf 'twice' > /opt/odd/one
ln /opt/odd/one /opt/odd/two
chown 1234:4321 /opt/odd/one
chmod 4755 /opt/odd/one
ln -s /nowhere /opt/odd/link
mknod /opt/odd/null c 1 3
mkfifo /opt/odd/pipe
truncate -s 1G /opt/odd/sparse
printf 'end' >> /opt/odd/sparse
name=$(printf 'latin\351')
printf 'bytes' > "/opt/odd/$name"
long=$(printf '%0200d' 7)
mkdir -p "/opt/odd/$long"
printf 'deep' > "/opt/odd/$long/$long"
cat /etc/ssh/ssh_host_ed25519_key.pub > /opt/odd/key-of-the-build
echo noise > /var/log/noise.log
echo gone > /tmp/gone
echo warned >&2
"""


APK = """#!/bin/sh
echo "$@" >> /etc/apk-asked
case "$*" in *openssh-server*) printf '#!/bin/sh\\necho "$@" > /run/started; exec sleep 9999\\n' \\
    > /usr/sbin/sshd; chmod 755 /usr/sbin/sshd;; esac
"""


@pytest.fixture(scope="module")
def alpine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem that calls itself Alpine: busybox, and an apk that only writes down."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is missing")
    applets = subprocess.run([busybox, "--list"], capture_output=True, check=True, text=True).stdout
    files = {
        "bin/busybox": (Path(busybox).read_bytes(), 0o755),
        "sbin/apk": (APK.encode(), 0o755),
        "sbin/rc-update": (b'#!/bin/sh\necho rc-update "$@" >> /etc/apk-asked\n', 0o755),
        "etc/os-release": (b'NAME="Alpine Linux"\nID=alpine\nVERSION_ID=3.20.0\n', 0o644),
        "etc/passwd": (b"root:x:0:0:root:/root:/bin/ash\n", 0o644),
        "etc/shadow": (b"root:!::0:::::\n", 0o640),
        "etc/inittab": (b"::sysinit:/sbin/openrc sysinit\ntty1::respawn:/sbin/getty\n", 0o644),
    }
    path = tmp_path_factory.mktemp("alpine") / "alpine-rootfs.tar.xz"
    with tarfile.open(path, "w:xz", preset=0) as tar:
        for name in ("bin", "sbin", "etc", "usr", "usr/sbin", "tmp", "root", "var", "var/log"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
        for applet in applets.split():
            if applet not in ("busybox", "init"):
                info = tarfile.TarInfo(f"bin/{applet}")
                info.type, info.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(info)
    return path


@pytest.mark.usefixtures("cleaned")
def test_what_a_script_makes_is_in_the_image_and_nothing_of_the_machine(
    banger: Installation, tmp_path: Path
) -> None:
    script = tmp_path / "furnish it.sh"
    script.write_text(FURNISH)
    done = banger.ok(
        "image", "build", "--name", "made", "--from-image", IMAGE, "--script", str(script), *SMALL
    )
    shown = done.err.splitlines()
    assert "warned" in shown
    assert any(line.startswith("furnishing build-") for line in shown)
    record = banger.json("image", "show", "made")
    assert (record["distro"], record["recipe"], record["managed"]) == ("debian", None, True)
    listing = subprocess.run(
        ["unsquashfs", "-lls", record["rootfs_path"]], capture_output=True, check=True
    ).stdout
    names = [line.split(b"squashfs-root/", 1)[-1] for line in listing.split(b"\n")]
    for absent in (
        b"etc/hostname", b"etc/resolv.conf", b"etc/ssh/ssh_host_ed25519_key", b"tmp/gone",
        b"etc/ssh/sshd_config.d/00-banger.conf", b"var/lib/banger", b"root/.gitconfig",
        b"root/.ssh", b"run/banger",
    ):  # fmt: skip
        assert absent not in names, absent
    assert {b"opt/odd/latin\xe9", b"var/log/noise.log", b"root/notes", b"tmp", b"proc"} <= set(
        names
    )
    script = r"""
cat /root/notes
stat -c '%a %u %g %h %s' /opt/odd/one /opt/odd/two
stat -c '%a' /opt/odd/empty
readlink /opt/odd/link
stat -c '%F %t %T' /opt/odd/null
stat -c '%F' /opt/odd/pipe
stat -c '%s' /opt/odd/sparse /var/log/noise.log
tail -c 3 /opt/odd/sparse; echo
cat /opt/odd/$(printf 'latin\351'); echo
cat /opt/odd/*7/*7; echo
cmp -s /opt/odd/key-of-the-build /etc/ssh/ssh_host_ed25519_key.pub && echo 'the same key'
echo end
"""
    ran = banger("vm", "run", "--rm", "-q", *SMALL, "--image", "made", "--", "sh", "-c", script)
    assert ran.status == 0, ran.err + banger.evidence()
    assert ran.text.splitlines() == [
        "of the build",
        "4755 1234 4321 2 5",
        "4755 1234 4321 2 5",
        "1777",
        "/nowhere",
        "character special file 1 3",
        "fifo",
        str((1 << 30) + 3),
        "0",
        "end",
        "bytes",
        "deep",
        "end",
    ]


@pytest.mark.usefixtures("cleaned")
def test_a_build_that_fails_or_is_interrupted_leaves_nothing(
    banger: Installation, tmp_path: Path
) -> None:
    images = [i["name"] for i in banger.json("image", "list", "--json")]
    bad = tmp_path / "bad.sh"
    bad.write_text("echo 'the reason' >&2\nexit 7\n")
    build = ("image", "build", "--name", "never", "--from-image", IMAGE, *SMALL, "--script")
    done = banger(*build, str(bad))
    assert done.status == 1
    assert "running the script bad.sh for never: it ended with status 7: the reason" in done.err
    slow = tmp_path / "slow.sh"
    slow.write_text("echo it runs\nexec sleep 600\n")
    p = banger.popen(*build, str(slow))
    assert p.stderr is not None
    for line in p.stderr:
        if line == b"it runs\n":
            break
    os.kill(p.pid, signal.SIGINT)
    _, rest = p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 130, rest
    assert [i["name"] for i in banger.json("image", "list", "--json")] == images


@pytest.mark.usefixtures("cleaned")
def test_alpine_is_built_from_an_archive_with_its_own_package_manager(
    banger: Installation, alpine: Path
) -> None:
    build = ("image", "build", "--name", "alpine", "--recipe", "alpine", *SMALL)
    done = banger.ok(*build, "--archive", str(alpine))
    assert "installing packages for alpine (openrc, openssh, bash" in done.err
    record = banger.json("image", "show", "alpine")
    assert (record["distro"], record["recipe"], record["kernel_ref"], record["oci"]) == (
        "alpine", "alpine", KERNEL, None,
    )  # fmt: skip
    script = "cat /etc/apk-asked /etc/shadow /etc/inittab"
    ran = banger("vm", "run", "--rm", "-q", *SMALL, "--image", "alpine", "--", "sh", "-c", script)
    asked, enabled, shadow, *inittab = ran.text.splitlines()
    assert asked.startswith("add --no-progress --update-cache -- openrc openssh bash build-base ")
    assert enabled == "rc-update add sshd default"
    assert shadow.startswith("root:*:")
    assert inittab == ["::sysinit:/sbin/openrc sysinit", "#tty1::respawn:/sbin/getty"]


@pytest.mark.usefixtures("cleaned")
def test_a_base_that_cannot_be_fetched_names_the_archive_as_another_way(
    banger: Installation, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\ndistro = "alpine"\narch = ["amd64"]\nfrom = "oci:127.0.0.1:1/mine:1"\n'
    )
    done = banger("image", "build", "--name", "mine", "--recipe", str(recipe))
    assert done.status == 1
    assert "--archive FILE" in done.err
    done = banger("image", "build", "--name", "v", "--recipe", "void")
    assert "it takes its root from an archive: --archive FILE" in done.err


@pytest.mark.usefixtures("cleaned")
def test_an_image_without_sshd_installs_one_at_its_first_boot(
    banger: Installation, alpine: Path
) -> None:
    reference = f"archive:{alpine}"
    banger.ok("image", "pull", reference, "--install-sshd", "--name", "bare")
    assert banger.json("image", "show", "bare")["install_sshd"] is True
    run = ("vm", "run", "-q", *SMALL, "--image", "bare", "--nat", "--name", "bare", "--")
    script = """until [ -e /run/started ]; do sleep 0.2; done
cat /run/started /etc/apk-asked
grep -c openssh-server /var/log/banger-first-boot.log
cat /etc/ssh/sshd_config.d/00-banger.conf | head -n 2"""
    done = banger(*run, "sh", "-c", script)
    assert done.text.splitlines() == [
        "-D",
        "add --no-progress --update-cache -- openssh-server",
        "1",
        "# Written by banger at each boot.",
        "PermitRootLogin prohibit-password",
    ], done.err + banger.evidence()
    banger.ok("vm", "delete", "bare")
    created = banger.ok("vm", "create", "-q", "--no-start", *SMALL, "--image", "bare")
    assert "warning: the image bare installs its sshd over the network" in created.err
    banger.ok("vm", "delete", created.text.strip())
