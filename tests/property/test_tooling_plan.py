"""The tooling plan: any text gives a plan, and every version file is accounted for in it."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from banger.workspace.tooling import (
    MISE_FILES,
    READERS,
    TOOL_FILES,
    ToolPlan,
    describe,
    plan_tools,
)

SAFE = re.compile(r"[a-z]+@[0-9A-Za-z][0-9A-Za-z.+_-]*")

versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,2}", fullmatch=True)
words = st.one_of(
    versions,
    versions.map("v{}".format),
    st.sampled_from(["lts/*", "stable", ">=18", "system", "--help", "-x", "1.2;rm", "$(id)", ""]),
    st.text(max_size=20),
)
lines = words.map(
    lambda w: (
        f"go {w}\ntoolchain go{w}\n[toolchain]\nchannel = {json.dumps(w)}\n[tools]\n"
        f"node = 1\n[project]\nrequires-python = {json.dumps(w)}\n"
    )
)
documents = words.map(lambda w: json.dumps({"engines": {"node": w}, "volta": {"node": w}}))
contents = st.one_of(
    st.binary(max_size=60), *(s.map(lambda t: t.encode()) for s in (words, lines, documents))
)
files = st.dictionaries(st.sampled_from(TOOL_FILES), contents, max_size=6)


@given(files)
def test_any_text_gives_a_plan_of_plain_words(texts: dict[str, bytes]) -> None:
    plan = plan_tools(texts)
    assert all(SAFE.fullmatch(step.word) for step in plan.steps)
    assert all(line.isprintable() for line in describe(plan))


@given(files)
def test_each_tool_has_one_step_and_all_are_in_order(texts: dict[str, bytes]) -> None:
    steps = plan_tools(texts).steps
    assert list(steps) == sorted(steps, key=lambda s: (s.tool, s.version))
    assert len({s.tool for s in steps}) == len(steps)


@given(files)
def test_plan_is_the_same_whatever_the_order_of_the_files(texts: dict[str, bytes]) -> None:
    assert plan_tools(texts) == plan_tools(dict(reversed(texts.items())))


@given(files)
def test_every_version_file_leads_to_a_step_or_to_a_reason(texts: dict[str, bytes]) -> None:
    plan = plan_tools(texts)
    said = {s.source for s in plan.steps} | {s.source for s in plan.skips}
    # These may be about something else than versions.
    quiet = {"package.json", "pyproject.toml"}
    assert {source for _, source, _ in READERS if source in texts} - quiet <= said
    assert all(skip.reason for skip in plan.skips)
    assert plan.mise_files == tuple(name for name in MISE_FILES if name in texts)


@given(files, st.sampled_from(["go", "golang", "node", "nodejs", "python", "rust"]), words)
def test_what_a_mise_file_manages_is_left_to_mise(
    texts: dict[str, bytes], tool: str, version: str
) -> None:
    for name, text in (
        (".tool-versions", f"{tool} {version.split()[0] if version.split() else '1'}\n"),
        ("mise.toml", f"[tools]\n{tool} = {json.dumps(version)}\n"),
    ):
        plan = plan_tools({**texts, name: text.encode()})
        assert {"golang": "go", "nodejs": "node"}.get(tool, tool) not in {
            step.tool for step in plan.steps
        }


@given(files)
def test_adding_a_mise_file_never_adds_a_step(texts: dict[str, bytes]) -> None:
    without = plan_tools({k: v for k, v in texts.items() if k not in MISE_FILES})
    assert set(plan_tools(texts).steps) <= set(without.steps)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan_tools({}) == ToolPlan()
    assert ToolPlan().empty
