"""Images made on the installed host."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import banger, expect
from tests.smoke.registry import scenario

# The whole root filesystem is read by an emulated guest.
_BUILD_S = 900
_SCRIPT = """\
echo 'made by a script' > /root/made
echo here > /etc/made
test ! -e /root/.gitconfig
"""


@scenario("pure", "an image made of another one by a script; a VM has it, no machine is left")
def image_build() -> None:
    names = banger.vm_names()
    base = banger.json("image", "list", "--json")[0]["name"]
    script = Path(guests.owner_home()) / "setup.sh"
    script.write_text(_SCRIPT)
    banger("image", "build", "--name", "made", "--from-image", base, "--script", str(script),
           timeout=_BUILD_S)  # fmt: skip
    expect(banger.vm_names() == names, "the machine of the build is left")
    out = banger("vm", "run", "--rm", "--image", "made", "--", "cat", "/root/made", "/etc/made")
    expect(out == "made by a script\nhere\n", f"the image has {out!r}")
    banger("image", "verify", "made")
    banger("image", "delete", "made")
    script.unlink()


@scenario("pure", "a container image of one program, out of an archive: pulled, verified and run")
def image_pull() -> None:
    archive = Path(guests.owner_home()) / "tiny.tar"
    # The one program of every Debian host that is linked statically.
    archive.write_bytes(_saved("tiny:1", {"tool": Path("/sbin/ldconfig").read_bytes()}))
    try:
        out = banger("vm", "run", "--rm", "--image", f"docker-archive:{archive}",
                     "--", "/tool", "--version")  # fmt: skip
        expect(out.startswith("ldconfig "), f"it says {out!r}")
    finally:
        archive.unlink()
    banger("image", "verify", "tiny")
    banger("image", "delete", "tiny")


def _saved(tag: str, programs: dict[str, bytes]) -> bytes:
    """An image of one layer, as `docker save` writes it."""
    layer = _tar(programs)
    described = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    files = {"manifest.json": manifest, "config.json": described}
    texts = {name: json.dumps(value).encode() for name, value in files.items()}
    return _tar({**texts, "layer.tar": layer})


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = 0o755, len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
