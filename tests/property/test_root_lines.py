"""The helper's gate against any line: stored ones, and mutations of right ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger_root import validate
from banger_root.errors import HelperError
from property.root_lines import judge, read_corpus

# A loaded machine is no defect of the code under test.
unhurried = settings(deadline=None)

VM_ID = "0123456789abcdef0123456789abcdef"
LAUNCH: dict[str, Any] = {
    "id": VM_ID,
    "firecracker_bin": "/usr/local/bin/firecracker",
    "jailer_bin": "/usr/local/bin/jailer",
    "kernel": "/var/lib/banger/kernels/k/vmlinux",
    "initrd": "/var/lib/banger/vms/v/initrd.img",
    "drives": [{"role": role, "path": f"/var/lib/banger/{role}"} for role in validate.ROLES],
    "console": "/var/lib/banger/vms/v/console.log",
}
PATHS = ("firecracker_bin", "jailer_bin", "kernel", "initrd", "console")

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
)
components = st.text(
    st.characters(exclude_characters="/\0\n", exclude_categories=("Cs",)), min_size=1, max_size=40
).filter(lambda part: part not in (".", ".."))
paths = st.lists(components, min_size=1, max_size=6).map(lambda parts: "/" + "/".join(parts))


def test_stored_lines_are_judged_as_before() -> None:
    found = [judge(line) for line in read_corpus()]
    assert set(validate.METHODS) | {"refused"} == set(found)


@unhurried
@given(st.data())
def test_stored_line_with_a_change_ends_in_a_checked_value_or_a_typed_refusal(
    data: st.DataObject,
) -> None:
    line = bytearray(data.draw(st.sampled_from(read_corpus())))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(line)))
        end = data.draw(st.integers(begin, min(len(line), begin + 8)))
        line[begin:end] = data.draw(st.binary(max_size=8))
    judge(bytes(line))


@unhurried
@given(st.sampled_from(validate.METHODS), st.dictionaries(st.text(), values, max_size=6))
def test_any_params_end_in_a_checked_value_or_a_typed_refusal(
    method: str, params: dict[str, Any]
) -> None:
    judge(json.dumps({"version": 1, "method": method, "params": params}).encode())


@unhurried
@given(st.fixed_dictionaries(dict.fromkeys(PATHS, paths)), st.lists(paths, min_size=4, max_size=4))
def test_absolute_paths_without_detours_pass_unchanged(
    named: dict[str, str], drives: list[str]
) -> None:
    params = {
        "id": VM_ID,
        **named,
        "drives": [
            {"role": role, "path": path} for role, path in zip(validate.ROLES, drives, strict=True)
        ],
    }
    plan = validate.parse_launch(params)
    assert {name: getattr(plan, name) for name in PATHS} == named
    assert list(plan.drives) == drives


@unhurried
@given(st.sampled_from(PATHS), values)
def test_anything_in_place_of_a_path_is_a_clean_path_or_is_refused(name: str, value: Any) -> None:
    judge(
        json.dumps({"version": 1, "method": "launch", "params": {**LAUNCH, name: value}}).encode()
    )


@unhurried
@given(paths, st.sampled_from(["..", ".", "", "a\nb", "a\0b", "\ud800", "a" * 1025]), st.data())
def test_detour_anywhere_in_a_path_is_refused(path: str, detour: str, data: st.DataObject) -> None:
    parts = path.split("/")
    parts.insert(data.draw(st.integers(1, len(parts))), detour)
    with pytest.raises(HelperError, match="kernel must be an absolute path"):
        validate.parse_launch({**LAUNCH, "kernel": "/".join(parts)})


@unhurried
@given(st.permutations(LAUNCH["drives"]))
def test_drives_pass_in_one_order_only(drives: list[dict[str, str]]) -> None:
    params = {**LAUNCH, "drives": copy.deepcopy(drives)}
    if drives == LAUNCH["drives"]:
        validate.parse_launch(params)
    else:
        with pytest.raises(HelperError, match="role must be"):
            validate.parse_launch(params)


@pytest.mark.parametrize("name", validate.SIGNALS)
def test_signal_has_one_meaning_in_every_spelling(name: str) -> None:
    for spelling in (name, name.lower(), f"SIG{name}", f"sig{name.capitalize()}"):
        assert validate.parse_signal({"id": VM_ID, "name": spelling}).name == name


@unhurried
@given(st.text() | st.integers() | st.sampled_from(["STOP", "SIGCONT", "KILL ", "9"]))
def test_what_is_no_signal_for_vms_is_refused(name: object) -> None:
    if isinstance(name, str) and name.upper().removeprefix("SIG") in validate.SIGNALS:
        return
    with pytest.raises(HelperError, match="name must be one of"):
        validate.parse_signal({"id": VM_ID, "name": name})
