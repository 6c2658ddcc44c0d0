"""`banger` as a user runs it, in this process: words in, status and text out.

Its directories are the test's own, and a test that does not expect a daemon gets none: starting one
is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from banger.cli import sizing
from banger.cli.entry import main
from banger.cli.server import Server
from banger.config.paths import Paths


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


class CommandLine:
    """Call it with the words after `banger`."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.starts = 0
        for name in ("STATE", "CACHE", "CONFIG"):
            monkeypatch.setenv(f"XDG_{name}_HOME", str(root / name.lower()))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(root / "run"))
        # Whatever this host has for daily use is not what is tested.
        monkeypatch.setenv("BANGER_MODE", "user")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(Server, "_spawn", self._refuse)
        # Read once per process, and this process runs many command lines.
        sizing.settings.cache_clear()
        sizing.defaults.cache_clear()
        self.paths = Paths.user_mode()
        self.paths.runtime.mkdir(parents=True, mode=0o700)

    def _refuse(self, _: Server) -> None:
        self.starts += 1
        raise AssertionError("this command line starts a daemon")

    def __call__(self, *words: str) -> Done:
        self._patch.setattr(sys, "argv", ["banger", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        text = self._capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Done(code, text.out, text.err)
