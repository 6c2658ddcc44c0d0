"""Images made on the installed host."""

from __future__ import annotations

from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import banger, expect
from tests.smoke.registry import scenario

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
    banger("image", "build", "--name", "made", "--from-image", base, "--script", str(script))
    expect(banger.vm_names() == names, "the machine of the build is left")
    out = banger("vm", "run", "--rm", "--image", "made", "--", "cat", "/root/made", "/etc/made")
    expect(out == "made by a script\nhere\n", f"the image has {out!r}")
    banger("image", "verify", "made")
    banger("image", "delete", "made")
    script.unlink()
