"""How one of banger's programs starts another: by the same interpreter, from the same files."""

from __future__ import annotations

import os
import sys


def module_command(module: str) -> list[str]:
    """The command line that calls `main()` of one of our modules; its arguments may follow.

    An installed program runs isolated (`python3 -IS`) and knows by itself where its packages lie;
    what it starts has to be told.
    """
    if not sys.flags.no_site:
        return [sys.executable, "-m", module]
    path = [entry for entry in sys.path if os.path.isabs(entry)]  # noqa: PTH117 - these are texts
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; sys.exit(main())"
    return [sys.executable, "-I", "-S", "-c", code]
