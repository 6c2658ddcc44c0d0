"""The house rules that no linter knows, read from the sources.

Layers, style and types are held by import-linter, ruff and mypy; what is here needs the words of
this project. A rule that a module must break is a row with its reason, not a silence.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
GATES = {"banger/process.py", "banger_root/process.py"}
_MOST_LINES = 500
_FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "manager", "misc"}

# Everything that starts a program without asking the gate.
_STARTERS = {
    "os": re.compile(r"system|popen|exec.*|spawn.*|posix_spawnp?|fork|forkpty"),
    "pty": re.compile(r"spawn|fork"),
    "asyncio": re.compile(r"create_subprocess_(exec|shell)"),
}
# What the callers of the gate need from `subprocess`: constants, and types to name and catch.
_SUBPROCESS_WORDS = {"PIPE", "DEVNULL", "STDOUT", "Popen", "CompletedProcess", "TimeoutExpired"}
_NEVER_CALLED = {"Popen", "CompletedProcess"}

# Where the kernel is asked by ioctl, and why there.
_IOCTL = {
    "banger/files.py": "FICLONE: shared extents",
    "banger/cli/stream.py": "TIOCGWINSZ: the size of our own terminal",
    "banger/vmm/vcpu.py": "KVM: the probe's vCPU",
    "banger_root/tap.py": "TUNSETIFF: the tap",
}
_NETLINK = {"banger_root/netlink.py": "links and addresses"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "src").as_posix()


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def dotted(tree: ast.AST) -> Iterator[tuple[str, str, ast.Attribute]]:
    """Every `module.word` in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr, node


def called(tree: ast.AST) -> set[int]:
    """The identities of the nodes that are called as functions."""
    return {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_programs_are_started_through_the_gate_only() -> None:
    found = []
    for name, tree in TREES.items():
        if name in GATES:
            continue
        calls = called(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "subprocess":
                # Import the module, so that its uses can be seen.
                found.append(f"{name}:{node.lineno}: from subprocess import")
        for module, word, where in dotted(tree):
            if module == "subprocess":
                bad = word not in _SUBPROCESS_WORDS or (
                    word in _NEVER_CALLED and id(where) in calls
                )
            else:
                bad = module in _STARTERS and bool(_STARTERS[module].fullmatch(word))
            if bad:
                found.append(f"{name}:{where.lineno}: {module}.{word}")
    assert not found, "use banger.process instead of:\n" + "\n".join(found)


def test_no_program_is_started_through_a_shell() -> None:
    found = [
        f"{name}:{node.value.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "shell"
    ]
    assert not found


def test_sqlite_is_spoken_in_the_store_only() -> None:
    users = {name for name, tree in TREES.items() if "sqlite3" in imports(tree)}
    assert {name for name in users if not name.startswith("banger/store/")} == set()


def test_kernel_interfaces_have_one_home_each() -> None:
    """A new home needs a row with its reason; a row without a user has to go."""

    def users(module: str, word: str) -> set[str]:
        return {n for n, tree in TREES.items() if (module, word) in {d[:2] for d in dotted(tree)}}

    assert users("fcntl", "ioctl") == set(_IOCTL)
    assert users("socket", "AF_NETLINK") == set(_NETLINK)


def test_zstd_has_one_home() -> None:
    """Which module it is depends on the Python; nobody else needs to know."""
    wanted = {"backports", "backports.zstd", "compression", "compression.zstd"}
    users = {name for name, tree in TREES.items() if wanted & set(imports(tree))}
    assert users == {"banger/zstd.py"}


def test_modules_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {n: length for n, length in lengths.items() if length > _MOST_LINES} == {}


def test_modules_are_named_for_what_they_own() -> None:
    assert [n for n in TREES if _FORBIDDEN_NAMES & set(Path(n).with_suffix("").parts)] == []


def test_modules_open_with_their_purpose() -> None:
    assert [n for n, tree in TREES.items() if len(ast.get_docstring(tree) or "") < 10] == []


def test_booleans_of_public_functions_are_keyword_only() -> None:
    found = [
        f"{name}:{node.lineno}: {node.name}({argument.arg}: bool)"
        for name, tree in TREES.items()
        # click gives its commands their options by keyword, whatever their signature says.
        if not name.startswith("banger/cli/")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        for argument in node.args.posonlyargs + node.args.args
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool"
    ]
    assert not found


def test_nothing_is_swallowed_by_a_bare_except() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not found


def tracked_files() -> list[Path]:
    git = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if git.returncode != 0:
        pytest.skip("this is no git checkout: which files are ours is not known")
    paths = [ROOT / name for name in git.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


# Put together here, so that this file does not break its own rule.
_HOSTS = [
    r"deb\.debian" r"\.org",
    r"security\.debian" r"\.org",
    r"\bpypi" r"\.org",
    r"files\.pythonhosted" r"\.org",
    r"registry\.npmjs" r"\.",
    r"proxy\.golang" r"\.org",
    r"sum\.golang" r"\.org",
    r"registry-1\.docker" r"\.io",
    r"\bghcr" r"\.io",
    r"\bquay" r"\.io",
    r"conda\.anaconda" r"\.org",
    r"\bcrates" r"\.io",
]  # fmt: skip
# Of homes, only those of people who exist nowhere: the smoke host's owner, and examples.
_MACHINE_PATHS = [r"/work" r"/(main|shared)", r"/tmp" r"/w/", r"/home" r"/(?!dev/|anna?/)\w+/"]


@pytest.mark.parametrize(
    "patterns", [_HOSTS, _MACHINE_PATHS], ids=["registries and mirrors", "paths of one machine"]
)
def test_no_tracked_file_names(patterns: list[str]) -> None:
    """Where packages come from is the user's configuration; where we work is nobody's business."""
    pattern = re.compile("|".join(patterns))
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found, "\n".join(found)
