"""The installation that is measured: its own state, runtime and bridge; the shared cache of builds.

Commands run through the installed program, as a user's would, with the default log level.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from banger.api.results import SshAccess
from banger.config.paths import Paths
from banger.rpc import client
from tests.bench.measure import timed
from tests.boot.installation import IMAGE, SMALL, Installation

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
PROGRAM = ROOT / ".venv" / "bin" / "banger"
BRIDGE, ADDRESS = "br-fc-bench", "10.217.0.1"


class Ground(Installation):
    """An `Installation` with kernel and image in it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, bridge=BRIDGE, address=ADDRESS)
        settings = self.config.read_text().splitlines()
        kept = [line for line in settings if not line.startswith("log_level")]
        self.config.write_text("\n".join(kept) + "\n")
        self.paths = Paths(
            state=self.state,
            cache=Path(self.env["XDG_CACHE_HOME"]) / "banger",
            runtime=self.runtime,
            config_file=self.config,
        )

    def furnish_with_git(self) -> str:
        """An image with git and rsync, which the other side of a comparison needs; its name."""
        name = f"{IMAGE}-git"
        recipes = self.root / "recipes"
        shutil.copytree(ROOT / "recipes", recipes)
        recipe = recipes / f"{name}.toml"
        text = (recipes / f"{IMAGE}.toml").read_text()
        text = text.replace(f'name = "{IMAGE}"', f'name = "{name}"')
        recipe.write_text(text.replace('"procps",', '"procps", "git", "rsync",'))
        self.ok("image", "build", "--name", name, "--recipe", str(recipe), timeout_s=1800)
        return name

    def argv(self, *words: str) -> list[str]:
        return [str(PROGRAM), *words]

    def time(self, *words: str) -> float:
        """Seconds of one command line of banger, which must succeed."""
        return timed(self.argv(*words), env=self.env)

    def create(self, name: str, *options: str) -> None:
        self.ok("vm", "create", "--name", name, *SMALL, *options, timeout_s=600)

    def ssh(self, name: str) -> list[str]:
        """OpenSSH's command line into a VM; no configuration, no connection shared or kept."""
        access = client.call(self.paths.daemon_socket, "vm.ssh", {"vm": name}, SshAccess)
        argv = ["ssh", "-F", "none"]
        for option in (
            f"HostKeyAlias={name}.vm",
            f"UserKnownHostsFile={access.known_hosts}",
            "GlobalKnownHostsFile=none",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            f"IdentityFile={access.key}",
            "ControlMaster=no",
            "BatchMode=yes",
        ):
            argv += ["-o", option]
        return [*argv, "-p", str(access.port), f"root@{access.address}"]
