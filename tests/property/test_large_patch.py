"""Patches of large files, made without git's own way; git applies them and is the judge."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.workspace import ground, large_patch
from banger.workspace.ground import open_ground
from banger.workspace.inspect import inspect_repository
from workspace_kit import commit, git, head, make_repository, tracked_files
from workspace_steps import SOAK

_LARGE = 3000
_NAMES = st.sampled_from(
    [b"big", b"sub/big file", b'odd\n"\xff\\', b"utf-\xc3\xa9", b"-x", b":(top)"]
)
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "append", "prepend", "truncate", "new"]),
        st.integers(0, 2**32),
    ),
    max_size=4,
)


def _edited(content: bytes, what: str, seed: int) -> bytes:
    number = random.Random(seed)
    at, count = number.randrange(len(content) + 1), number.choice([1, 100, 200, 5000])
    match what:
        case "overwrite":
            return content[:at] + number.randbytes(count) + content[at + count :]
        case "insert":
            return content[:at] + number.randbytes(count) + content[at:]
        case "delete":
            return content[:at] + content[at + count :]
        case "append":
            return content + number.randbytes(count)
        case "prepend":
            return number.randbytes(count) + content
        case "truncate":
            return content[:at]
        case _:
            return number.randbytes(number.choice([0, 1, _LARGE, 200_000]))


@pytest.mark.timeout(600 * SOAK)
@settings(max_examples=25 * SOAK, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.dictionaries(
        _NAMES, st.tuples(st.integers(0, 300_000), _EDITS), min_size=1, max_size=3
    ),
    fate=st.sampled_from(["edit", "edit", "edit", "remove", "add", "chmod", "rename"]),
    seed=st.integers(0, 2**32),
)
def test_git_makes_of_the_patch_what_was_done(
    files: dict[bytes, tuple[int, list[tuple[str, int]]]], fate: str, seed: int
) -> None:
    number = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for module in (large_patch, ground):
            patch.setattr(module, "LARGE_BYTES", _LARGE)
        patch.setattr(large_patch, "_PIECE", 8192)
        work = Path(name)
        source, copy = make_repository(work / "source"), work / "copy"
        (source / "always").write_text("here\n")
        contents = {n: number.randbytes(size) for n, (size, _) in files.items()}
        if fate != "add":
            _write(source, contents)
        commit(source)
        git(work, "clone", "-q", str(source), str(copy))
        base = head(copy)
        for at, (n, (_, edits)) in enumerate(files.items()):
            path = copy / Path(*map(str, [n.decode(errors="surrogateescape")]))
            if at == 0 and fate == "remove":
                path.unlink()
                continue
            content = contents[n]
            for what, edit_seed in edits:
                content = _edited(content, what, edit_seed)
            _write(copy, {n: content})
            if fate == "chmod":
                path.chmod(0o755)
            if fate == "rename":
                path.rename(copy / f"renamed-{at}")
        git(copy, "add", "-A")
        tree = git(copy, "write-tree").decode().strip()
        parts: list[bytes] = []
        with open_ground(work, inspect_repository(copy), "sha1") as place:
            place.git.run("read-tree", tree, doing="reading the tree")
            assert place.write_patch(base, parts.append) == sum(map(len, parts))
        if parts:
            git(
                source, "apply", "--binary", "--index", "--whitespace=nowarn", stdin=b"".join(parts)
            )
        assert git(source, "write-tree").decode().strip() == tree
        assert tracked_files(source) == tracked_files(copy)


def _write(root: Path, contents: dict[bytes, bytes]) -> None:
    for name, content in contents.items():
        path = root / name.decode(errors="surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_change_in_place_is_a_small_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_patch, "LARGE_BYTES", 1 << 20)
    source = make_repository(tmp_path / "source")
    content = random.Random(1).randbytes(5 << 20)
    (source / "big").write_bytes(content)
    base = commit(source)
    for edited in (
        content[: 3 << 20] + b"changed" + content[(3 << 20) + 7 :],
        content[: 3 << 20] + b"inserted" + content[3 << 20 :],
        content + b"appended",
    ):
        (source / "big").write_bytes(edited)
        git(source, "add", "-A")
        parts: list[bytes] = []
        with open_ground(tmp_path, inspect_repository(source), "sha1") as place:
            place.git.run("read-tree", git(source, "write-tree").decode().strip(), doing="")
            assert place.write_patch(base, parts.append) < 10_000
