"""Entry point of `/usr/bin/python3 -I -S -B <this directory or a zip of it>`.

Isolated mode leaves only the standard library on the path, so a directory run this way has to
introduce itself as the package `banger_root`; in a zip the package lies beside this file.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def _introduce() -> None:
    here = sys.path[0]
    if __package__ or not os.path.isdir(here):
        return
    spec = importlib.util.spec_from_file_location(
        "banger_root", os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["banger_root"] = package
    spec.loader.exec_module(package)
    # Our module names must not stand where the standard library's are looked up.
    sys.path.remove(here)


_introduce()

from banger_root.server import main  # noqa: E402 - only now can it be found

sys.exit(main(sys.argv[1:]))
