"""Recipe texts: whatever is in the file, the answer is a recipe or an error that names the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.image.recipe import LoadedRecipe, load_recipe

LINES = [
    'name = "x"', 'distro = "debian"', 'suite = "bookworm"', 'arch = ["amd64"]',
    'from = "debootstrap"', 'kernel_ref = "k"', 'packages = ["make"]', 'variant = "apt"',
    'variant = "buildd"', "features = [1]", "[[files]]", 'path = "/a"', 'content = ""',
    'mode = "9"',
    "[[downloads]]", "=", '"', "[x]",
]  # fmt: skip


@given(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(LINES)).map("\n".join)))
def test_any_text_gives_a_recipe_or_an_error_with_its_place(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            assert isinstance(load_recipe(str(path)), LoadedRecipe)
        except BangerError as e:
            assert e.code == "bad_request"
            assert "x.toml" in e.message
