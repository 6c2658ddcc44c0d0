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


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


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


each_module = pytest.mark.parametrize("path", SOURCES, ids=name_of)


@each_module
def test_programs_are_started_through_the_gate_only(path: Path) -> None:
    name = name_of(path)
    if name in GATES:
        return
    tree = parse(path)
    calls = called(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "subprocess":
            pytest.fail(f"{name}:{node.lineno}: import the module, so that its uses can be seen")
    for module, word, where in dotted(tree):
        at = f"{name}:{where.lineno}: {module}.{word}"
        if module == "subprocess":
            assert word in _SUBPROCESS_WORDS, f"{at}: use banger.process"
            assert word not in _NEVER_CALLED or id(where) not in calls, f"{at}: use banger.process"
        elif starter := _STARTERS.get(module):
            assert not starter.fullmatch(word), f"{at}: use banger.process"


@each_module
def test_no_program_is_started_through_a_shell(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"{name_of(path)}:{node.value.lineno}: shell=")


@each_module
def test_sqlite_is_spoken_in_the_store_only(path: Path) -> None:
    assert "sqlite3" not in imports(parse(path)) or name_of(path).startswith("banger/store/")


@each_module
def test_kernel_interfaces_have_one_home_each(path: Path) -> None:
    name = name_of(path)
    words = {(module, word) for module, word, _ in dotted(parse(path))}
    assert ("fcntl", "ioctl") not in words or name in _IOCTL, "ioctl elsewhere: say why in _IOCTL"
    assert ("socket", "AF_NETLINK") not in words or name in _NETLINK


def test_no_exception_outlives_its_reason() -> None:
    """A row of the tables above that no module needs any more has to go."""
    needed = {
        name_of(path)
        for path in SOURCES
        for module, word, _ in dotted(parse(path))
        if (module, word) in {("fcntl", "ioctl"), ("socket", "AF_NETLINK")}
    }
    assert needed == {*_IOCTL, *_NETLINK}


@each_module
def test_module_is_short_named_for_what_it_is_and_opens_with_its_purpose(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= _MOST_LINES
    assert not _FORBIDDEN_NAMES & set(Path(name_of(path)).with_suffix("").parts)
    docstring = ast.get_docstring(parse(path))
    assert docstring, "no docstring"
    # A heading, or sentences.
    assert len(docstring) > 10


@each_module
def test_booleans_of_public_functions_are_keyword_only(path: Path) -> None:
    # click gives its commands their options by keyword, whatever their signature says.
    if name_of(path).startswith("banger/cli/"):
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in node.args.posonlyargs + node.args.args:
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool":
                    pytest.fail(f"{name_of(path)}:{node.lineno}: {node.name}({argument.arg}: bool)")


@each_module
def test_nothing_is_swallowed_by_a_bare_except(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}"


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
_MACHINE_PATHS = [r"/work" r"/(main|shared)", r"/tmp" r"/w/", r"/home" r"/\w+/"]


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
