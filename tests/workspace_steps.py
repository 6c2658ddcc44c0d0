"""Steps that make a work tree: the strategies and what each step does, judged by git and the shell.

Few letters, so that names collide, nest and replace each other. `BANGER_SOAK=N` runs N times the
examples of the tests that use them.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import strategies as st

from workspace_kit import git, remove

SOAK = int(os.environ.get("BANGER_SOAK") or 1)
PART = st.one_of(
    st.sampled_from([b"a", b"b", b"c d", b"new\nline", b"tab\t", b'q"uote', b"\xff\xfe", b"-x"]),
    st.binary(min_size=1, max_size=6).filter(
        lambda b: b"/" not in b and b"\0" not in b and b not in (b".", b"..")
        and b.lower() != b".git"
    ),
    st.just(b"long" * 30),
)  # fmt: skip
NAME = st.lists(PART, min_size=1, max_size=3).map(b"/".join)
CONTENT = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"one\ntwo\n", b"one\r\ntwo\r\n", b"no end", b"\0binary\xff" * 20]),
)
FILE_STEPS = ("write", "write", "link", "remove", "chmod", "rename", "ignore")
GIT_STEPS = ("stage", "stage_all", "unstage", "commit", "branch")

Step = tuple[str, bytes, bytes]


def steps(kinds: tuple[str, ...], most: int) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.tuples(st.sampled_from(kinds), NAME, CONTENT), max_size=most)


def clear_way(root: bytes, name: bytes) -> bytes:
    """Make room for a file: parents become directories, whatever has the name goes."""
    path = root
    for part in name.split(b"/")[:-1]:
        path = os.path.join(path, part)
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        os.makedirs(path, exist_ok=True)
    path = os.path.join(root, name)
    if os.path.isdir(path) and not os.path.islink(path):
        remove(Path(os.fsdecode(path)))
    elif os.path.lexists(path):
        os.unlink(path)
    return path


def apply_step(repository: Path, step: Step) -> None:
    what, name, content = step
    root = os.fsencode(repository)
    path = os.path.join(root, name)
    if what == "write":
        with open(clear_way(root, name), "wb") as f:
            f.write(content)
    elif what == "ignore":
        with open(clear_way(root, b".gitignore"), "wb") as f:
            f.write(b"/" + name.split(b"/")[0].replace(b"\n", b"?") + b"\n*.o\n")
    elif what == "link":
        os.symlink(content.replace(b"\0", b"0") or b"x", clear_way(root, name))
    elif what == "remove" and os.path.lexists(path):
        clear_way(root, name)
    elif what == "rename" and os.path.lexists(path):
        target = b"renamed-" + (content.replace(b"\0", b"").replace(b"/", b"")[:9] or b"x")
        if not os.path.lexists(os.path.join(root, target)):
            os.rename(path, os.path.join(root, target))
    elif what == "chmod" and os.path.isfile(path) and not os.path.islink(path):
        os.chmod(path, os.stat(path).st_mode ^ 0o111)
    elif what == "stage":
        git(repository, "add", "-A", "-f", "--", b":(literal)" + name, check=False)
    elif what == "stage_all":
        git(repository, "add", "-A")
    elif what == "unstage":
        git(repository, "rm", "-q", "--cached", "-r", "--", b":(literal)" + name, check=False)
    elif what == "commit":
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "--allow-empty", "-m", "in the guest")
    elif what == "branch":
        git(repository, "checkout", "-q", "-b", f"b{len(name)}", check=False)
