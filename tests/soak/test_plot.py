"""The pictures, drawn of made-up samples: run by `make soak`, which alone has matplotlib."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from tests.soak.examples import make_run
from tests.soak.lines import LINES, PICTURES
from tests.soak.plot import draw


def test_pictures_show_every_line_and_are_the_same_each_time(tmp_path: Path) -> None:
    run = make_run()
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        draw(run, tmp_path / directory)
    for kind in PICTURES:
        first = (tmp_path / "one" / f"soak-{kind}.svg").read_bytes()
        assert first == (tmp_path / "two" / f"soak-{kind}.svg").read_bytes()
        words = " ".join(ET.fromstring(first).itertext())
        for line in LINES:
            if line.picture == kind:
                assert line.words.replace("`", "") in words
