"""An image whose init is OpenRC: it boots into it, runs commands, and stops its services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def openrc(banger: Installation) -> Iterator[str]:
    """Debian with OpenRC and one service of its own."""
    recipe = str(Path(__file__).parent / "openrc.toml")
    banger.ok("image", "build", "--name", "openrc", "--recipe", recipe, timeout_s=900)
    yield "openrc"
    banger.ok("image", "delete", "openrc")


def test_a_machine_with_openrc_runs_commands_and_stops_its_services(
    banger: Installation, openrc: str
) -> None:
    done = banger(
        "vm", "run", "-q", "--name", "rc", *SMALL, "--image", openrc, "--", "cat", "/etc/os-release"
    )
    assert "ID=debian\n" in done.text, done.err + banger.evidence()
    # Commands run while it still boots: the service is there when it has.
    script = "until [ -e /run/witness.pid ]; do sleep 0.2; done; cat /proc/1/comm"
    assert banger.ok("vm", "exec", "rc", "--", "sh", "-c", script).text == "init\n"
    stopped = banger.ok("vm", "stop", "rc")
    assert "kill" not in stopped.err + stopped.text
    banger.ok("vm", "start", "rc")
    assert banger.ok("vm", "exec", "rc", "--", "cat", "/root/witness").text == "stopped\n"
    banger.ok("vm", "delete", "rc")
