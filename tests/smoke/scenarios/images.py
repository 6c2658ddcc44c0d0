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

_BUSYBOX = Path("/bin/busybox")
_SCRIPT = """\
echo 'made by a script' > /root/made
echo here > /etc/made
test ! -e /root/.gitconfig
"""


@scenario("pure", "a container image out of an archive: pulled, run, made another by a script")
def image_build() -> None:
    names = banger.vm_names()
    home = Path(guests.owner_home())
    archive, script = home / "tiny.tar", home / "setup.sh"
    # Linked statically, and each program that it is called by: nothing else is in the image.
    busybox = _BUSYBOX.read_bytes()
    archive.write_bytes(_saved("tiny:1", {"bin/sh": busybox, "bin/cat": busybox}))
    script.write_text(_SCRIPT)
    try:
        out = banger("vm", "run", "--rm", "--image", f"docker-archive:{archive}",
                     "--", "/bin/sh", "-c", "echo from $0", "within")  # fmt: skip
        expect(out == "from within\n", f"it says {out!r}")
        banger("image", "verify", "tiny")
        banger("image", "build", "--name", "made", "--from-image", "tiny", "--script", str(script))
        expect(banger.vm_names() == names, "the machine of the build is left")
    finally:
        archive.unlink()
        script.unlink()
    out = banger("vm", "run", "--rm", "--image", "made", "--", "cat", "/root/made", "/etc/made")
    expect(out == "made by a script\nhere\n", f"the image has {out!r}")
    banger("image", "verify", "made")
    banger("image", "delete", "made", "tiny")


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
