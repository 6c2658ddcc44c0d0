"""`python -m banger.daemon.builder --state DIR --cache DIR image RECIPE [OPTIONS] | kernel NAME`.

The daemon's own code for stored things, in a process of its own: for commands on a host where the
daemon's service may not start what a build needs (new privileges for user namespaces). An image is
built into the cache only; the daemon publishes it. Events are JSON lines on stdout, the last line
is `{"result": …}` or `{"error": …}`. SIGINT and SIGTERM cancel: nothing half made is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec

from banger.api.envelope import WireError
from banger.config.paths import Paths
from banger.errors import BangerError
from banger.image.build import build_artefact
from banger.image.features import Extras, read_extras
from banger.image.recipe import load_recipe
from banger.kernel.pull import ensure_kernel


class Lines:
    """A reporter that writes each event as one line."""

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.write({"stage": stage, "label": label, "detail": detail})

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        self.write({"done": done, "total": total, "detail": detail})

    def warn(self, message: str) -> None:
        self.write({"warning": message})

    def write(self, event: dict[str, Any]) -> None:
        # Nobody listens any more: the signal that ends us is on its way.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
            sys.stdout.buffer.flush()


async def build(paths: Paths, kind: str, what: str, lines: Lines, extras: Extras) -> None:
    """Do the one thing that was asked for. Raises BangerError as the services do."""
    work = asyncio.create_task(
        build_artefact(paths, load_recipe(what), reporter=lines, extras=extras)
        if kind == "image"
        else _kernel(paths, what, lines)
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    await work


async def _kernel(paths: Paths, name: str, lines: Lines) -> None:
    await ensure_kernel(paths, name, reporter=lines)


def main() -> int:
    """0: done; 1: failed, and the last line says why; 130: cancelled."""
    parser = argparse.ArgumentParser(prog="banger.daemon.builder", allow_abbrev=False)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("kind", choices=("image", "kernel"))
    parser.add_argument("what")
    for option in ("--package", "--feature", "--script"):
        parser.add_argument(option, action="append", default=[])
    options = parser.parse_args()
    os.umask(0o077)
    paths = Paths(
        state=options.state, cache=options.cache, runtime=options.state, config_file=Path("/")
    )
    lines = Lines()
    try:
        extras = read_extras(
            tuple(options.package), tuple(options.feature), tuple(map(Path, options.script))
        )
        asyncio.run(build(paths, options.kind, options.what, lines, extras))
    except BangerError as e:
        lines.write({"error": msgspec.to_builtins(WireError.of(e))})
        return 1
    except asyncio.CancelledError:
        return 128 + signal.SIGINT
    except Exception as e:
        # A defect of ours: whoever reads the lines gets a sentence, stderr the place.
        traceback.print_exc()
        text = f"building {options.what}: unexpected {type(e).__name__}: {e}"
        lines.write({"error": {"code": "operation_failed", "message": text}})
        return 1
    lines.write({"result": {}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
