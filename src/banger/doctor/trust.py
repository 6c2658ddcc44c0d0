"""Whether root may believe a file: every component of its path up to `/` is root's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def distrust(path: Path, *, root: Path = Path("/")) -> str | None:
    """Why root should not run or read `path`; None where nobody but root can change it.

    Links are followed a step at a time: the directory of each link, and where it leads, count.
    `root` is where the walk ends (tests).
    """
    seen = 0
    todo = [path]
    while todo:
        current = todo.pop()
        # A chain of links that never ends; the kernel gives up at 40 too.
        seen += 1
        if seen > 40:
            return f"{path} is a chain of links without an end"
        for component in (current, *current.parents):
            try:
                st = component.lstat()
            except OSError as e:
                return f"{component}: {os.strerror(e.errno or 0)}"
            if st.st_uid != 0:
                return f"{component} belongs to uid {st.st_uid}"
            if stat.S_ISLNK(st.st_mode):
                target = component.parent / component.readlink()
                rest = current.relative_to(component)
                todo.append(Path(os.path.normpath(target / rest)))
            elif st.st_mode & 0o022 and not (component.is_dir() and st.st_mode & stat.S_ISVTX):
                return f"{component} can be written by others (mode {stat.S_IMODE(st.st_mode):04o})"
            if component == root:
                break
    return None
