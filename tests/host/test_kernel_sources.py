"""Our kernel fragment against the real sources: every option survives, nothing is compiled.

The sources come through this host's apt, 150 MB; what came of a version and a fragment is kept in
the cache of builds, so that the same pair is tried once on a machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from banger import files
from banger.config.paths import Paths
from banger.disk.artefacts import built_artefacts, inputs_key
from banger.disk.background import Job
from banger.kernel import apt
from banger.kernel.build_recipe import KernelRecipe, list_build_recipes, read_options
from banger.kernel.build_tools import BUILD_TOOLS, find_missing_tools
from banger.kernel.compile import configure
from banger.kernel.fragment import find_lost, format_options
from banger.kernel.requirements import (
    find_missing_boot_options,
    find_missing_container_options,
    find_missing_options,
)
from banger.kernel.sources import find_source_package, read_version, unpack_source_package

pytestmark = [
    pytest.mark.host,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("apt-cache") is None, reason="this host has no apt"),
    pytest.mark.skipif(
        bool(find_missing_tools(BUILD_TOOLS)),
        reason="missing: " + ", ".join(tool.name for tool in find_missing_tools(BUILD_TOOLS)),
    ),
]


@pytest.mark.parametrize("recipe", list_build_recipes(), ids=lambda recipe: recipe.name)
def test_every_option_of_a_recipe_survives_in_the_newest_sources(
    recipe: KernelRecipe, tmp_path: Path
) -> None:
    job = Job()
    options = read_options(recipe)
    package = find_source_package(recipe, entry=recipe.name, job=job)

    def build(staging: Path) -> None:
        with files.staging_directory(staging, "scratch") as scratch:
            deb = apt.download(package, scratch, job=job)
            tree = scratch / "linux"
            unpack_source_package(deb, tree, job=job)
            assert read_version(tree, what=package.name).startswith(f"{recipe.series}.")
            config = configure(tree, options, name=recipe.name, log=tmp_path / "make.log", job=job)
        (staging / "config").write_text(config)

    cache = Paths.user_mode().build_cache / "kernel-configurations" / recipe.name
    key = inputs_key(("1", package.name, package.version, package.sha256, format_options(options)))
    with built_artefacts(cache, key, build, job=job) as built:
        config = (built / "config").read_text()
    assert find_lost(options, config) == ()
    assert find_missing_options(config) == ()
    assert find_missing_boot_options(config) == ()
    assert find_missing_container_options(config) == ()
    assert "=m\n" not in config
