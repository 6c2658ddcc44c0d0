"""A container image to a bootable file: ours against skopeo, umoci and mksquashfs, on one registry.

    .venv/bin/python tests/bench/oci_import.py [MiB [LAYERS]]

Both sides start without a cache and pull from a docker-registry on loopback. Ours runs as a process
of its own, so that its peak memory and that of its sqfstar are known. Needs root, docker-registry,
skopeo, umoci and squashfs-tools.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from oci_kit import Entry, build_image, directory, layer_tar, write_layout  # noqa: E402

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
    _pull(paths, plan, lambda _: None, Job())
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
        print(f"    {argv[0]:10} {time.monotonic() - began:6.1f} s")


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


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        ours(sys.argv[2], Path(sys.argv[3]))
        return
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    if missing := [t for t in ("docker-registry", "skopeo", "umoci") if not shutil.which(t)]:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise SystemExit("needs root: umoci gives files their owners")
    with tempfile.TemporaryDirectory(prefix="bo-", dir="/var/tmp") as directory:
        place = Path(directory)
        print(f"making an image of {mib} MiB in {count} layers")
        layout = write_layout(place / "layout", build_image(make_layers(mib, count)))
        server, host = serve(place)
        try:
            name = f"{host}/bench/app:v1"
            subprocess.run(
                ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{name}"],
                check=True,
                capture_output=True,
            )
            began = time.monotonic()
            (place / "theirs").mkdir()
            theirs(name, place / "theirs")
            other = time.monotonic() - began
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, "--ours", name, place / "ours"],
                check=True,
                capture_output=True,
            )
            own = time.monotonic() - began
        finally:
            server.terminate()
            server.wait()
        peak, sqfstar = json.loads(done.stdout).values()
        print(f"  theirs {other:6.1f} s  {mib / other:6.1f} MiB/s")
        print(f"  ours   {own:6.1f} s  {mib / own:6.1f} MiB/s  peak {peak} + {sqfstar} MiB")
        print(f"  ratio  {own / other:6.2f}  (aim: 0.7 or less)")


if __name__ == "__main__":
    main()
