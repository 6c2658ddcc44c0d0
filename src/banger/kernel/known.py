"""Kernels that this installation can get by itself: packages to fetch, and recipes to build."""

from __future__ import annotations

from banger.kernel.build_recipe import find_build_recipe
from banger.kernel.pull import find_catalog_kernel


def is_known_kernel(name: str) -> bool:
    """Whether this installation can get a kernel of this name by itself."""
    return find_catalog_kernel(name) is not None or find_build_recipe(name) is not None
