"""What this banger is: version, commit and build time, from the build or from git's own files."""

from __future__ import annotations

from banger import __version__


def version_line() -> str:
    """`banger <version> (commit <8 hex>, built <RFC 3339>)`, without what is not known."""
    try:
        from banger._build import BUILT_AT, COMMIT  # type: ignore[import-not-found,unused-ignore]  # made by the wheel's build
    except ImportError:
        return f"banger {__version__} (development checkout)"
    return f"banger {__version__} (commit {COMMIT[:8]}, built {BUILT_AT})"
