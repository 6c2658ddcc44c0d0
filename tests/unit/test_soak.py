"""The judgement of the soak: which lines grow, and that noise, outliers and warm-up do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.soak.examples import make_run
from tests.soak.judge import Bound, judge, theil_sen
from tests.soak.lines import LINES
from tests.soak.report import build_section, build_table, replace_section, write_csv

SHARE, COUNT = Bound(share=0.05), Bound(amount=0.5)
TIMES = [float(t) for t in range(0, 3600, 40)]


def noisy(base: float, *, noise: float, growth: float = 0.0, seed: int = 1) -> list[float]:
    """Samples around a line that grows by `growth` over the run."""
    chance = random.Random(seed)
    return [base + growth * t / TIMES[-1] + chance.gauss(0, noise) for t in TIMES]


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=30, unique=True),
    st.integers(-50, 50),
    st.integers(-1000, 1000),
)
def test_slope_of_an_exact_line_is_its_slope(xs: list[int], slope: int, base: int) -> None:
    found = theil_sen([float(x) for x in xs], [float(base + slope * x) for x in xs])
    assert found.slope == pytest.approx(slope)
    assert found.low == pytest.approx(slope)


def test_slope_needs_two_moments() -> None:
    with pytest.raises(ValueError, match="different times"):
        theil_sen([1.0, 1.0], [1.0, 2.0])


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_flat_and_a_leak_in_it_is_not(seed: int) -> None:
    assert judge(TIMES, noisy(45_000, noise=900, seed=seed), SHARE).word == "flat"
    leaking = noisy(45_000, noise=900, growth=6_000, seed=seed)
    assert judge(TIMES, leaking, SHARE).word == "grows"


def test_growth_within_the_bound_is_flat() -> None:
    verdict = judge(TIMES, noisy(45_000, noise=10, growth=1_000), SHARE)
    assert verdict.word == "flat"
    assert verdict.growth == pytest.approx(1_000 * 5 / 6, rel=0.05)


def test_shrinking_is_no_leak() -> None:
    assert judge(TIMES, noisy(45_000, noise=10, growth=-20_000), SHARE).word == "flat"


def test_third_of_outliers_and_a_warm_up_change_nothing() -> None:
    values = [10.0] * len(TIMES)
    for i in range(len(values) // 3, 2 * len(values) // 3, 2):
        values[i] = 500.0
    values[0], values[1] = 0.0, 2.0
    assert judge(TIMES, values, COUNT).word == "flat"


@pytest.mark.parametrize("every", [1, 5, 20])
def test_descriptor_that_leaks_now_and_then_is_found(every: int) -> None:
    values = [20.0 + i // every for i in range(len(TIMES))]
    assert judge(TIMES, values, COUNT).word == "grows"


def test_few_samples_are_not_judged() -> None:
    verdict = judge(TIMES[:9], [float(i) for i in range(9)], COUNT)
    assert (verdict.word, verdict.samples) == ("too few samples", 7)


def test_growing_line_is_named_and_stands_in_the_table(tmp_path: Path) -> None:
    run = make_run()
    assert run.grown == ["daemon_fds"]
    rows = build_table(run).splitlines()
    assert len(rows) == len(LINES) + 2
    (row,) = [row for row in rows if row.startswith("| daemon, descriptors ")]
    assert row.endswith("| 0.5 | grows |")
    text = write_csv(run, tmp_path / "x" / "soak.csv").read_text().splitlines()
    assert len(text) == 41
    assert text[0].startswith("time_s,daemon_rss_kib,")


def test_section_replaces_the_last_one_and_nothing_else() -> None:
    before = "# A\n<!-- soak: begin -->\nbefore it\n<!-- soak: end -->\nafter\n"
    text = replace_section(before, build_section(make_run(), "x.csv"))
    assert text.startswith("# A\n<!-- soak: begin -->\nThe last soak, 2026-01-01 00:00 UTC: 40 cyc")
    assert text.endswith("<!-- soak: end -->\nafter\n")
    assert "before it" not in text
    assert replace_section(text, "new\n") == before.replace("before it", "new")
    with pytest.raises(ValueError, match="has no"):
        replace_section("# A\n", "x")


def test_documentation_has_a_place_for_the_last_soak() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert "new\n" in replace_section(text, "new\n")
