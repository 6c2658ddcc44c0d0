"""Fuzz the root helper's decoder and validators, guided by the code that each input reaches.

    python -m pip install atheris
    python tools/fuzz_root.py [--seconds N] [--keep]

It starts from the stored corpus and stops at the first defect, leaving the input beside. `--keep`
adds what reached new code to the corpus, which the property tests replay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LINE_LIMIT = 600
_KEEP_LIMIT = 60


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--worker"]:
        _work(arguments[1:])
    parser = argparse.ArgumentParser(description="Fuzz the root helper's gate.")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args(arguments)
    corpus = ROOT / "tests/property/root_lines.corpus"
    with tempfile.TemporaryDirectory() as scratch:
        seeds, found = Path(scratch) / "seeds", Path(scratch) / "found"
        for directory in (seeds, found):
            directory.mkdir()
        known = corpus.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(known):
            (seeds / str(number)).write_bytes(line)
        status = _run(f"-max_total_time={options.seconds}", str(found), str(seeds))
        if status == 0 and options.keep:
            # Each of these reached code that none before it did.
            news = {p.read_bytes() for p in found.iterdir()} - set(known)
            lines = sorted((line for line in news if line and b"\n" not in line), key=len)
            corpus.write_bytes(b"".join(line + b"\n" for line in [*known, *lines[:_KEEP_LIMIT]]))
            sys.stdout.write(f"{len(lines[:_KEEP_LIMIT])} lines added to {corpus}\n")
    return status


def _run(*options: str) -> int:
    # The fuzzer ends its process, so each of its runs has one.
    argv = [sys.executable, __file__, "--worker", f"-max_len={_LINE_LIMIT}", *options]
    return subprocess.run(argv, check=False).returncode


def _work(options: list[str]) -> None:
    import atheris

    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    with atheris.instrument_imports(include=["banger_root", "json"]):
        from property.root_lines import judge

    def try_line(line: bytes) -> None:
        judge(line)

    atheris.Setup([sys.argv[0], *options], try_line)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
