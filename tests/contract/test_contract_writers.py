"""Files that appear whole: whoever writes in any other way than `banger.files` says why he may.

`banger.files` is the one writer of state: beside, fsync, rename. A place that opens a file for
writing, or gives one a name, is a row here with its reason; a row without its place has to go.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest
from test_rules import TREES

_WRITERS = {"banger/files.py", "banger_root/ledger.py", "banger_root/trust.py"}
"""Beside, fsync, rename, fsync of the directory; the helper's two, as it imports nothing."""

_STAGED = "inside a staging directory, which is synced before it gets its name"
_SCRATCH = "scratch of one call, which goes with it"
_REMADE = "made anew at each start"
_CACHE = "a cache: believed by its hash, and fetched again"

# Module → (how many places, why).
_ALLOWED = {
    "banger/catalog/bundle.py": (2, _STAGED),
    "banger/catalog/published.py": (1, _STAGED),
    "banger/cli/bundles.py": (
        2,
        "named by its hash when it is whole and synced",
    ),
    "banger/cli/cp_out.py": (1, "a pipe or a device of the user's"),
    "banger/cli/entry.py": (2, "the standard streams that our caller closed"),
    "banger/cli/image_build.py": (1, "a copy, which is synced before it is named"),
    "banger/cli/server.py": (2, "a lock, and the words of a daemon that is being started"),
    "banger/cli/stream.py": (1, "stdout, opened again"),
    "banger/cli/vm_workspace.py": (1, "a pipe or a device of the user's"),
    "banger/daemon/leftovers.py": (1, "a lock"),
    "banger/daemon/main.py": (1, "a lock"),
    "banger/disk/background.py": (1, "a lock"),
    "banger/disk/blank.py": (5, "a template is synced before it is named, a longer disk at once"),
    "banger/disk/initrd.py": (2, _REMADE),
    "banger/disk/squashfs_root.py": (1, "the owner in an image, synced before it is named"),
    "banger/doctor/leases.py": (1, "a lock"),
    "banger/faults.py": (1, "the mark of an order that was carried out, in tests"),
    "banger/host/helper.py": (1, "a log"),
    "banger/host/vmm_process.py": (2, "a console, and a cgroup"),
    "banger/image/build.py": (1, _STAGED),
    "banger/image/cache.py": (1, _CACHE),
    "banger/image/downloads.py": (1, _STAGED),
    "banger/image/entries.py": (2, "what is removed, or replaced, is moved out of sight first"),
    "banger/image/register.py": (1, "a promoted copy is synced before it is named"),
    "banger/kernel/base_initrd.py": (1, _STAGED),
    "banger/kernel/build.py": (3, _STAGED),
    "banger/kernel/compile.py": (2, _SCRATCH),
    "banger/kernel/entries.py": (1, "what is removed is moved out of sight first"),
    "banger/kernel/given.py": (2, _STAGED),
    "banger/kernel/package.py": (3, _STAGED),
    "banger/kernel/pull.py": (1, "an initrd is synced before it is named"),
    "banger/kernel/signature.py": (3, _SCRATCH),
    "banger/kernel/sources.py": (2, _SCRATCH),
    "banger/oci/blobs.py": (2, _CACHE),
    "banger/oci/download.py": (1, _CACHE),
    "banger/oci/eviction.py": (1, "a lock"),
    "banger/oci/unpacked.py": (1, _SCRATCH),
    "banger/rpc/operations.py": (2, "a journal, appended to; it need not outlive the host"),
    "banger/store/database.py": (2, "SQLite's own; the copy is synced before it is named"),
    "banger/system/installer.py": (
        3,
        "a link, its directory synced; a file that changes hands",
    ),
    "banger/system/release.py": (2, _STAGED),
    "banger/vm/create.py": (2, "a directory on its way out, and back"),
    "banger/vm/file_sync.py": (1, "reads the owner's files"),
    "banger/vmm/firecracker.py": (1, _REMADE),
    "banger/vmm/fetch.py": (2, "synced before it is named, and believed by its pin"),
    "banger/vmm/vcpu.py": (1, "/dev/kvm"),
    "banger/workspace/export.py": (1, _SCRATCH),
    "banger/workspace/ground.py": (6, _SCRATCH),
    "banger/workspace/landing.py": (
        5,
        "the user's files, which come from a guest; a copy's are synced before they are named",
    ),
    "banger/workspace/large_patch.py": (1, _SCRATCH),
    "banger/workspace/manifest.py": (1, "an offer, written whole, becomes the manifest"),
    "banger/workspace/partial.py": (3, "the user's files, as cp(1) leaves them"),
    "banger/workspace/scratch.py": (8, _SCRATCH),
    "banger/workspace/view.py": (1, _SCRATCH),
    "banger_root/bridge.py": (1, "a file of sysfs"),
    "banger_root/cgroup.py": (1, "a cgroup"),
    "banger_root/host_lock.py": (1, "a lock"),
    "banger_root/jail.py": (1, "directories on their way out"),
    "banger_root/launch.py": (1, "a console"),
    "banger_root/mounts.py": (1, "an empty file to mount on"),
    "banger_root/forward.py": (1, "a file of procfs"),
    "banger_root/paths.py": (2, "an empty file for the owner, and opening what was checked"),
    "banger_root/scope.py": (1, "a cgroup"),
    "banger_root/server.py": (1, "/dev/net/tun"),
    "banger_root/tap.py": (1, "/dev/net/tun"),
}

_METHODS = {"write_text", "write_bytes", "rename", "truncate", "symlink_to", "hardlink_to"}
_DICTS = ast.Dict | ast.DictComp
_OS_CALLS = {"rename", "replace", "renames", "truncate", "ftruncate", "link", "symlink"}


def writes(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call that opens a file for writing, changes one in place, or gives one a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_write(node):
            yield node


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_write(call: ast.Call) -> bool:
    function = call.func
    words = [
        a.value if isinstance(a, ast.Constant) and isinstance(a.value, str) else ""
        for a in call.args
    ]
    words += [
        k.value.value
        for k in call.keywords
        if k.arg == "mode" and isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)
    ]
    if isinstance(function, ast.Name):
        return function.id == "open" and len(words) > 1 and bool(set("wxa+") & set(words[1]))
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "shutil":
        return function.attr in ("copy", "copy2", "copyfile", "copytree", "move")
    of_os = isinstance(function.value, ast.Name) and function.value.id == "os"
    name = function.attr
    if of_os and name == "open":
        flags = {n.attr for a in call.args[1:] for n in ast.walk(a) if isinstance(n, ast.Attribute)}
        unseen = {n.id for a in call.args[1:2] for n in ast.walk(a) if isinstance(n, ast.Name)}
        # Flags by name are looked for where they are made, by whoever reads a row here.
        return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}) or "flags" in unseen
    if of_os:
        return name in _OS_CALLS
    if name == "open":
        return any(w in {"w", "wb", "x", "xb", "a", "ab", "r+b", "w+b", "x+b"} for w in words)
    if name == "replace":
        # str.replace and datetime.replace take two arguments, or keywords; the zone a dictionary.
        return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], _DICTS)
    return name in _METHODS


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')", "path.write_bytes(b)", "open(name, 'w')", "path.open('ab')",
        "open(name, mode='r+')", "path.open(mode='w')", "os.open(name, os.O_WRONLY | os.O_TRUNC)",
        "os.open(name, flags)", "os.replace(a, b)", "a.replace(b)", "a.rename(b)",
        "shutil.copyfile(a, b)", "os.ftruncate(fd, 0)",
    ],
)  # fmt: skip
def test_a_write_is_seen(line: str) -> None:
    assert len(list(writes(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "open(name)", "open(name, 'rb')", "path.open('rb')", "a.replace('b', 'c')",
        "when.replace(tzinfo=UTC)", "os.open(name, os.O_RDONLY)", "tarfile.open(name, 'r:gz')",
    ],
)  # fmt: skip
def test_a_read_is_none(line: str) -> None:
    assert list(writes(ast.parse(line))) == []


def test_state_is_written_by_the_one_writer_or_for_a_reason() -> None:
    found = Counter(
        {name: sum(1 for _ in writes(tree)) for name, tree in TREES.items() if name not in _WRITERS}
    )
    expected = {name: count for name, (count, _) in _ALLOWED.items()}
    # Write through `banger.files.new_file` or `publish_directory`, or say here why not.
    assert +found == expected
