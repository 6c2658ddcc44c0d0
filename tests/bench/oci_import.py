"""A container image to a bootable file: ours against skopeo, umoci and mksquashfs, on one registry.

    .venv/bin/python tests/bench/oci_import.py [MiB [LAYERS]]      one comparison
    .venv/bin/python tests/bench/run.py oci                         all figures, kept in the results

Both sides start without a cache and pull from a docker-registry on loopback. Ours runs as a process
of its own, so that its peak memory and that of its sqfstar are known. Needs root, docker-registry,
skopeo, umoci and squashfs-tools.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.bench.ground import Ground
    from tests.bench.measure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from oci_kit import Entry, Image, build_image, directory, layer_tar, write_layout  # noqa: E402

MIB = 1 << 20


def make_layers(mib: int, count: int) -> list[bytes]:
    """Layers of files as programs have them: many small, some large, half compressible."""
    rng = random.Random(1)
    word = rng.randbytes(1 << 16)
    layers = []
    for number in range(count):
        entries = [directory(f"d{number}")]
        left = mib * MIB // count
        while left > 0:
            size = min(left, rng.choice((2_000, 8_000, 20_000, 60_000, 400_000, 2_000_000)))
            half = size // 2
            content = rng.randbytes(half) + (word * (half // len(word) + 1))[: size - half]
            entries.append(Entry(f"d{number}/{len(entries):06}", content=content))
            left -= size
        layers.append(layer_tar(entries))
    return layers


def ours(reference: str, place: Path) -> None:
    """What `image pull` does, in this process."""
    from banger.config.paths import Paths
    from banger.disk.background import Job
    from banger.image.pull import _pull, plan_pull

    paths = Paths(
        state=place / "state", cache=place / "cache", runtime=place, config_file=place / "none"
    )
    plan = plan_pull(reference, default_registry="registry.invalid", kernel_ref="k")
    _pull(paths, plan, Job())
    # Not ru_maxrss, which begins with what the parent had at exec.
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"peak_mib": int(peak) // 1024, "sqfstar_mib": children // 1024}))


def theirs(reference: str, place: Path) -> None:
    """The same job by the tools that exist for it."""
    for argv in (
        ["skopeo", "copy", "--src-tls-verify=false", f"docker://{reference}", f"oci:{place}/l:t"],
        ["umoci", "unpack", "--image", f"{place}/l:t", f"{place}/bundle"],
        ["mksquashfs", f"{place}/bundle/rootfs", f"{place}/x.sqfs", "-comp", "lz4", "-no-progress"],
    ):
        began = time.monotonic()
        subprocess.run(argv, check=True, capture_output=True)
        print(f"    {argv[0]:10} {time.monotonic() - began:6.1f} s", file=sys.stderr)


def serve(place: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{s.getsockname()[1]}"
    (place / "c.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{host}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {place}/r}}}}\n"
    )
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(
        ["docker-registry", "serve", place / "c.yml"], stdout=quiet, stderr=quiet
    )
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://{host}/v2/", timeout=10).close()
            return server, host
        except urllib.error.URLError:
            time.sleep(0.05)
    raise SystemExit("docker-registry does not start")


class _Sides(NamedTuple):
    theirs_s: float
    ours_s: float
    peak_mib: int
    sqfstar_mib: int


def _compare(name: str, place: Path) -> _Sides:
    """One import by each side, both without a cache."""
    began = time.monotonic()
    (place / "theirs").mkdir()
    theirs(name, place / "theirs")
    other = time.monotonic() - began
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--ours", name, place / "ours"], check=True, capture_output=True
    )
    own = time.monotonic() - began
    shutil.rmtree(place / "theirs")
    shutil.rmtree(place / "ours")
    return _Sides(other, own, *json.loads(done.stdout).values())


@contextlib.contextmanager
def _published(mib: int, count: int) -> Iterator[tuple[str, Path, Image]]:
    """An image in a registry: its reference, a scratch directory, its blobs."""
    with tempfile.TemporaryDirectory(prefix="bo-", dir="/var/tmp") as directory:
        place = Path(directory)
        image = build_image(make_layers(mib, count))
        layout = write_layout(place / "layout", image)
        server, host = serve(place)
        try:
            name = f"{host}/bench/app:v1"
            subprocess.run(
                ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{name}"],
                check=True,
                capture_output=True,
            )
            yield name, place, image
        finally:
            server.terminate()
            server.wait()


def missing() -> list[str]:
    """What keeps the comparison from being made on this host."""
    tools = [t for t in ("docker-registry", "skopeo", "umoci", "mksquashfs") if not shutil.which(t)]
    return tools + (["root, because umoci gives files their owners"] if os.geteuid() else [])


def figures(ground: Ground, runs: int) -> list[Figure]:
    """Imports of 300 MiB and of 1.5 GiB, a second pull, and what a VM takes on disk."""
    from tests.bench.measure import Figure, load

    if absent := missing():
        print(f"bench: no figures of imports: {', '.join(absent)}", file=sys.stderr)
        return []
    found = []
    peaks: list[float] = []
    # One pair of the large one takes minutes.
    for mib, count, pairs in ((300, 5, min(runs, 3)), (1536, 20, 1)):
        before = load()
        with _published(mib, count) as (name, place, image):
            sides = [_compare(name, place) for _ in range(pairs)]
            peaks += [max(s.peak_mib, s.sqfstar_mib) * MIB / 1e6 for s in sides]
            found.append(
                Figure(
                    key=f"oci_{mib}",
                    title=f"OCI image of {mib} MiB in {count} layers to a bootable file",
                    against="`skopeo copy` + `umoci unpack` + `mksquashfs`",
                    unit="s",
                    aim=0.7,
                    ours=[s.ours_s for s in sides],
                    theirs=[s.theirs_s for s in sides],
                    load=before,
                    parts={
                        "mib_per_s": mib / statistics.median(s.ours_s for s in sides),
                        "peak_mib": max(s.peak_mib for s in sides),
                        "sqfstar_peak_mib": max(s.sqfstar_mib for s in sides),
                    },
                )
            )
            if mib == 300:
                found.append(_second_pull(ground, runs, name, image))
    found.append(
        Figure(
            key="oci_peak",
            title="the same, peak memory of the larger of banger and sqfstar",
            unit="MB",
            aim=300,
            ours=[max(peaks)],
        )
    )
    return [*found, _disk_of_a_vm(ground)]


def _second_pull(ground: Ground, runs: int, name: str, image: Image) -> Figure:
    from tests.bench.measure import Figure, load

    before = load()
    ground.ok("image", "pull", name)
    try:
        again = [ground.time("image", "pull", name) for _ in range(runs)]
    finally:
        ground.ok("image", "delete", "app-v1")
        for digest in image.blobs:  # out of the cache that is shared
            (ground.paths.oci_blobs / digest.removeprefix("sha256:")).unlink(missing_ok=True)
    return Figure(
        key="oci_again",
        title="`image pull` of an image that is here, unchanged",
        unit="s",
        aim=0.3,
        ours=again,
        load=before,
    )


def _disk_of_a_vm(ground: Ground) -> Figure:
    """What the host writes for one more VM of an image: two blank disks of 8 GiB and an initrd.

    Counted are blocks that the VM does not share. After its first boot the guest has written too,
    which is a part of its own.
    """
    from banger.files import can_share_extents
    from tests.bench.measure import Figure, load

    before = load()
    ground.ok(
        "vm", "create", "--name", "disk", "--vcpu", "1", "--memory", "512M",
        "--disk-size", "8G", "--system-overlay-size", "8G",
    )  # fmt: skip
    try:
        directory = ground.paths.vm(ground.show("disk")["id"]).directory
        shares = can_share_extents(ground.paths.state)

        def allocated(path: Path) -> float:
            return path.stat().st_blocks * 512 / 1e6

        templates = ground.paths.templates.glob(f"*-{8 << 30}-*.ext4")
        blank = 0.0 if shares else sum(allocated(path) for path in templates)
        initrd = 0.0 if shares else allocated(directory / "initrd.img")
        whole = sum(allocated(p) for p in directory.rglob("*") if p.is_file())
    finally:
        ground.ok("vm", "delete", "disk")
    return Figure(
        key="vm_disk",
        title="disk used by one more VM before it writes (blank disks and initrd)",
        unit="MB",
        aim=2,
        ours=[blank + initrd],
        load=before,
        parts={
            "blank_disks_mb": blank,
            "initrd_mb": initrd,
            "directory_after_boot_mb": whole,
            "shares_blocks": float(shares),
        },
    )


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        ours(sys.argv[2], Path(sys.argv[3]))
        return
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    if absent := missing():
        raise SystemExit(f"missing: {', '.join(absent)}")
    print(f"making an image of {mib} MiB in {count} layers")
    with _published(mib, count) as (name, place, _):
        sides = _compare(name, place)
    print(f"  theirs {sides.theirs_s:6.1f} s  {mib / sides.theirs_s:6.1f} MiB/s")
    print(
        f"  ours   {sides.ours_s:6.1f} s  {mib / sides.ours_s:6.1f} MiB/s  "
        f"peak {sides.peak_mib} + {sides.sqfstar_mib} MiB"
    )
    print(f"  ratio  {sides.ours_s / sides.theirs_s:6.2f}  (aim: 0.7 or less)")


if __name__ == "__main__":
    main()
