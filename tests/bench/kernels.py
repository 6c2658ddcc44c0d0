"""How soon a guest of each kernel can run commands, and that containers' needs are met in it.

`generic-6.12` is built by the first bench that asks for it, which takes minutes, and comes out of
the cache of builds afterwards: same sources, options and compiler, same kernel.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.bench import report
from tests.bench.bare_machine import BareMachine
from tests.bench.ground import ADDRESS, Ground
from tests.bench.measure import Figure, alternate, load
from tests.boot.installation import KERNEL, SMALL

BUILT = "generic-6.12"
_VM, _IMAGE = "kernels", "on-generic"
_BUILD_S = 4 * 3600
# The daemon's port for announcements, on the bridge: the one that every guest may reach.
_HOST_PORT = "7001"
_TOOLS = "/root/tools"


def boot(ground: Ground, runs: int) -> list[Figure]:
    """From the start of the VMM to the agent: the built kernel against the distribution's."""
    report.say(f"bench: kernel {BUILT}, from the cache or built now")
    release = ground.json("kernel", "build", BUILT, "--json", timeout_s=_BUILD_S)["release"]
    check_containers(ground, release)
    built, packaged = (
        BareMachine(ground, kernel=BUILT, number=250),
        BareMachine(ground, kernel=KERNEL, number=251),
    )
    before = load()
    built.open()
    try:
        packaged.open()
        try:
            ours, theirs = alternate(runs, built.boot, packaged.boot)
        finally:
            packaged.close()
    finally:
        built.close()
    return [
        Figure(
            key="kernel",
            title=f"boot of {BUILT}, to the agent",
            against=KERNEL,
            unit="s",
            aim=0.75,
            ours=ours,
            theirs=theirs,
            load=before,
        )
    ]


def check_containers(ground: Ground, release: str) -> None:
    """Boot a guest of the built kernel and do in it what containers need, or say what failed.

    nft is the host's own, with its libraries: small images have none.
    """
    rootfs = next(iter(ground.state.glob("images/*/rootfs.sqfs")))
    ground.ok("image", "register", "--name", _IMAGE, "--rootfs", str(rootfs), "--kernel-ref", BUILT)
    ground.ok("vm", "create", "--name", _VM, "--image", _IMAGE, *SMALL)
    try:
        tools = ground.root / "tools"
        loader = _collect(tools, shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin"))
        script = Path(__file__).with_name("containers.sh")
        ground.ok("vm", "cp", str(tools), f"{_VM}:{_TOOLS}")
        ground.ok("vm", "cp", str(script), f"{_VM}:/root/containers.sh")
        nft = f"{_TOOLS}/{loader} --library-path {_TOOLS} {_TOOLS}/nft"
        ground.ok(
            "vm", "exec", _VM, "--", "env", f"NFT={nft}", "bash", "/root/containers.sh",
            release, ADDRESS, _HOST_PORT,
        )  # fmt: skip
    finally:
        ground.ok("vm", "delete", _VM)
        ground.ok("image", "delete", _IMAGE)


def _collect(directory: Path, program: str | None) -> str:
    """Copy a program and what it is linked with; the name of the loader that starts it."""
    if program is None:
        raise RuntimeError("the check of containers needs nft on this host")
    directory.mkdir()
    shutil.copy(program, directory)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    paths = [Path(word) for word in linked.split() if word.startswith("/")]
    for path in paths:
        shutil.copy(path, directory)
    return next(path.name for path in paths if path.name.startswith("ld-"))
