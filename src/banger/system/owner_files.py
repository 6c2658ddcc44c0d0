"""What `banger system install` makes in the owner's home, in a process that runs as the owner.

Root follows nothing in somebody's home: whatever links lie there, this process has no more rights
than whoever put them there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.paths import Paths
from banger.config.settings import read_settings
from banger.config.system_paths import SystemPaths
from banger.errors import BangerError
from banger.process import run

if TYPE_CHECKING:
    from banger.config.install import InstallRecord

_PROGRAM = (
    "import sys; sys.path += [sys.argv[1]]; "
    "from banger.system.owner_files import main; sys.exit(main(sys.argv[2:]))"
)
_DEADLINE_S = 60.0


def ensure_owner_files(system: SystemPaths, record: InstallRecord, release: Path) -> Path:
    """Make the key that opens the owner's guests, where it is absent; return its path.

    Raises:
        BangerError: the owner's home or configuration does not let it be made.
    """
    python = (release / "bin/banger").read_text(encoding="utf-8").split()[0].removeprefix("#!")
    done = run(
        [python, "-I", "-S", "-B", "-c", _PROGRAM, str(release / "lib"),
         str(system.root), record.home],
        cwd=Path("/"),
        env={"HOME": record.home, "USER": record.owner, "LOGNAME": record.owner},
        timeout_s=_DEADLINE_S,
        check=False,
        user=(record.uid, record.gid) if os.geteuid() == 0 else None,
    )  # fmt: skip
    words = (done.stdout + done.stderr).decode(errors="replace").strip()
    if done.returncode != 0:
        raise BangerError(
            "operation_failed",
            f"making the ssh key of {record.owner}: {words or f'status {done.returncode}'}",
            hint=f"ls -ld {record.home}/.local/state/banger/ssh",
        )
    return Path(words)


def main(arguments: list[str]) -> int:
    """`ROOT HOME`: make the key, print where it is."""
    from banger.ssh.keys import ensure_owner_key

    root, home = map(Path, arguments)
    os.umask(0o077)
    paths = Paths.system_mode(SystemPaths(root=root), home)
    try:
        configured = read_settings(*paths.config_files, home=home).ssh_key_path
        key = Path(configured) if configured else paths.ssh_key
        ensure_owner_key(key)
    except (BangerError, OSError) as e:
        sys.stderr.write(f"{e}\n")
        return 1
    sys.stdout.write(f"{key}\n")
    return 0
