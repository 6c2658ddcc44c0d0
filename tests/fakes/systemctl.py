"""A `systemctl` of the tests: a program on PATH that keeps a list of its calls and obeys.

`start` and `restart` make a unit active, unless its name stands in the file `broken`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

_PROGRAM = """#!{python} -IS
import json, os, sys
here = {here!r}
with open(here + "/calls", "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
verb, units = sys.argv[1], sys.argv[2:]
broken = open(here + "/broken").read().split() if os.path.exists(here + "/broken") else []
for unit in units:
    state = here + "/" + unit
    if verb in ("start", "restart"):
        if unit in broken:
            if os.path.exists(state):
                os.unlink(state)
            sys.exit("Job for " + unit + " failed.")
        open(state, "w").close()
    elif verb == "stop" and os.path.exists(state):
        os.unlink(state)
    elif verb == "is-active":
        print("active" if os.path.exists(state) else "inactive")
        sys.exit(0 if os.path.exists(state) else 3)
"""


class Systemctl:
    """The fake, found first on PATH for as long as the test runs."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        self.directory = directory
        directory.mkdir()
        program = directory / "systemctl"
        program.write_text(_PROGRAM.format(python=sys.executable, here=str(directory)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    @property
    def calls(self) -> list[list[str]]:
        path = self.directory / "calls"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def orders(self) -> list[str]:
        """Verb and unit of every call that changes something."""
        return [" ".join(words) for words in self.calls if words[0] != "is-active"]

    def forget(self) -> None:
        (self.directory / "calls").unlink(missing_ok=True)

    def break_unit(self, *units: str) -> None:
        (self.directory / "broken").write_text(" ".join(units))

    def is_active(self, unit: str) -> bool:
        return (self.directory / unit).exists()
