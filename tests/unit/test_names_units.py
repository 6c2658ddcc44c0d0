"""Names, sizes and durations: what people type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.names import check_entry_name, check_vm_name, generate_vm_name
from banger.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 << 30),
        ("4GiB", 4 << 30),
        ("512m", 512 << 20),
        ("512MiB", 512 << 20),
        ("4KiB", 4096),
        ("2048", 2 << 30),
    ],
)
def test_sizes_are_read_with_base_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["3X", "", "-1", "1.5G", "G", "4 4G", "1iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


@given(st.integers(min_value=1, max_value=1 << 20), st.sampled_from("KMGT"))
def test_a_whole_size_is_written_as_it_is_read(number: int, letter: str) -> None:
    size = parse_size(f"{number}{letter}")
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("5m", 300), ("1h30m", 5400), ("0", 0), ("1.5s", 1.5)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10s", "5m", "1h30m", "1h1s", "24h", "0s"])
def test_a_duration_is_written_as_it_is_read(text: str) -> None:
    assert format_duration(parse_duration(text)) == text


@pytest.mark.parametrize("text", ["", "10", "s", "1d", "m5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "empty"),
        ("a" * 64, "63 at most"),
        ("-a", "hyphen"),
        ("a-", "hyphen"),
        ("aB", "position 2"),
        ("a_b", "position 2"),
        ("a.b", "position 2"),
        ("ns", "reserved"),
        ("localhost", "reserved"),
        ("ä", "position 1"),
        ("a\n", "position 2"),
    ],
)
def test_a_bad_vm_name_is_refused_with_its_rule(name: str, rule: str) -> None:
    with pytest.raises(BangerError, match=rule) as caught:
        check_vm_name(name)
    assert caught.value.code == "bad_request"


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_every_dns_label_in_lower_case_is_a_name(name: str) -> None:
    if name not in ("ns", "localhost"):
        assert check_vm_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-a", "a b", "a\0"])
def test_an_entry_name_never_climbs(name: str) -> None:
    with pytest.raises(BangerError):
        check_entry_name(name, "kernel")


def test_a_generated_name_is_valid_and_numbered_after_five_collisions() -> None:
    asked: list[str] = []

    def taken(name: str) -> bool:
        asked.append(name)
        return len(asked) <= 6

    name = generate_vm_name(taken)
    assert check_vm_name(name) == name
    assert [n.count("-") for n in asked] == [1] * 5 + [2] * 2
