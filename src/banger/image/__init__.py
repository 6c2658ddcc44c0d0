"""Image service: recipes, building root filesystems, and the images that are stored.

An image is one read-only root filesystem file with a manifest, shared by all its VMs.
"""

from banger.image.build import build_image, ensure_image
from banger.image.entries import (
    check_image_files,
    delete_image,
    find_image,
    get_image,
    list_images,
    verify_image,
)
from banger.image.recipe import LoadedRecipe, Recipe, list_recipes, load_recipe

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "build_image",
    "check_image_files",
    "delete_image",
    "ensure_image",
    "find_image",
    "get_image",
    "list_images",
    "list_recipes",
    "load_recipe",
    "verify_image",
]
