"""Kernel service: entries that guests boot from, and how they are got.

A kernel entry is `vmlinux`, a base initrd with the guest agent, and `modules.sqfs`.
"""

from banger.kernel.entries import (
    check_kernel_files,
    delete_kernel,
    find_kernel,
    get_kernel,
    list_kernels,
    verify_kernel,
)
from banger.kernel.pull import (
    CATALOG,
    ensure_base_initrd,
    ensure_kernel,
    find_catalog_kernel,
    pull_kernel,
)

__all__ = [
    "CATALOG",
    "check_kernel_files",
    "delete_kernel",
    "ensure_base_initrd",
    "ensure_kernel",
    "find_catalog_kernel",
    "find_kernel",
    "get_kernel",
    "list_kernels",
    "pull_kernel",
    "verify_kernel",
]
