"""Debian roots: mmdebstrap from the host's configured apt sources to a tar stream on a pipe.

No root needed: mmdebstrap uses user namespaces for other users. apt inside it checks signatures.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.process import ProcessFailed, find_program, get_program, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from banger.disk.background import Job
    from banger.image.recipe import LoadedRecipe

_MOST_SCRIPT = 96 << 10
_INDEX_FORMAT = "$(SITE)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"


def parse_apt_sources(targets: str, suite: str) -> tuple[str, ...]:
    """One-line apt sources for Debian's `suite`, its updates and security, in the host's order.

    `targets` are lines of `apt-get indextargets` in `_INDEX_FORMAT`. Other vendors' repositories
    are left out, also when they use the same suite name.
    """
    wanted = (suite, f"{suite}-updates", f"{suite}-security", f"{suite}/updates")
    components: dict[tuple[str, str], list[str]] = {}
    for line in targets.splitlines():
        fields = line.split("|")
        if len(fields) != 5 or not re.match(r"(https?|file|copy|mirror)[:+]", fields[1]):
            continue
        _, uri, release, component, origin = fields
        if release in wanted and origin == "Debian":
            seen = components.setdefault((uri, release), [])
            if component not in seen:
                seen.append(component)
    return tuple(
        f"deb {uri} {release} {' '.join(parts)}" for (uri, release), parts in components.items()
    )


def read_apt_sources(suite: str, job: Job) -> tuple[str, ...]:
    """The host's apt sources for this suite; none when the host has another distribution.

    As root, missing package lists are fetched once: without them apt does not say whose a
    repository is.

    Raises:
        BangerError: apt is there and fails.
    """
    apt_get = find_program("apt-get")
    if apt_get is None:
        return ()
    argv = [apt_get, "indextargets", "--format", _INDEX_FORMAT, "Created-By: Packages"]
    found = parse_apt_sources(run(argv).stdout.decode(), suite)
    if not found and is_root():
        job.run([apt_get, "-q", "update"])
        found = parse_apt_sources(run(argv).stdout.decode(), suite)
    return found


def build_mmdebstrap_argv(
    loaded: LoadedRecipe, sources: Sequence[str], *, mmdebstrap: str, root: bool
) -> list[str]:
    """The command line that writes the recipe's root as tar to stdout. Decides, does nothing.

    Without `sources` mmdebstrap takes its own default for the suite.
    """
    recipe = loaded.recipe
    argv = [
        mmdebstrap,
        f"--mode={'root' if root else 'unshare'}",
        f"--variant={recipe.variant}",
        "--format=tar",
        f"--architectures={recipe.arch[0]}",
        f"--include={','.join(recipe.packages)}",
        "--aptopt=Acquire::Languages none",
        # A root that is lost in a crash is built again: dpkg need not sync each file.
        "--dpkgopt=force-unsafe-io",
    ]
    # dpkg takes the last rule that matches: what is to be kept comes after what is left out.
    argv += [f"--dpkgopt=path-exclude={path}" for path in recipe.exclude_paths]
    argv += [f"--dpkgopt=path-include={path}" for path in recipe.include_paths]
    if "usr-is-merged" in recipe.packages:
        # The package refuses a root that is not merged yet; without it, apt picks the converter
        # and perl along with it.
        argv.append("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
    for name in recipe.scripts:
        # As an argument, not as a file: in a user namespace the script would be unreadable below
        # a private directory, and nothing has to be removed afterwards.
        text = _script(name, loaded.sources[name])
        words = f"{shlex.quote(text)} {shlex.quote(name)}"
        argv.append(f'--customize-hook=chroot "$1" /bin/sh -eu -c {words}')
    assert recipe.suite is not None
    argv += [recipe.suite, "-", *sources]
    return argv


def _script(name: str, content: bytes) -> str:
    """A script's text, which has to fit into one argument (execve(2), MAX_ARG_STRLEN)."""
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise BangerError("bad_request", f"the script {name} is no UTF-8 text") from e
    if len(content) > _MOST_SCRIPT or "\0" in text:
        raise BangerError(
            "bad_request", f"the script {name} is larger than {_MOST_SCRIPT >> 10} KiB, or no text"
        )
    return text


def find_mmdebstrap() -> str:
    """The program's path.

    Raises:
        BangerError: not_found; or this user has no ids for a user namespace.
    """
    mmdebstrap = get_program("mmdebstrap", package="mmdebstrap")
    if not is_root():
        get_program("newuidmap", package="uidmap")
        if not _has_subordinate_ids():
            raise BangerError(
                "operation_failed",
                "building an image needs subordinate user ids, and /etc/subuid has none for you",
                hint="sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER",
            )
    return mmdebstrap


def explain_failure(e: ProcessFailed, suite: str) -> BangerError:
    """What mmdebstrap's last words mean for the user."""
    lines = [line for line in e.stderr.splitlines() if line.startswith(("E:", "Err:", "W:"))]
    words = "; ".join(lines[-4:]) or e.stderr[-400:]
    hint = "sudo apt-get update"
    if re.search(r"NO_PUBKEY|not signed|couldn't be verified", e.stderr):
        hint = "sudo apt-get install debian-archive-keyring"
    elif "No space left" in e.stderr:
        hint = "df -h ${TMPDIR:-/tmp}"
    return BangerError(
        "operation_failed",
        f"making a root filesystem of {suite}: mmdebstrap ended with status {e.status}: {words}",
        hint=hint,
    )


def is_root() -> bool:
    """Whether mmdebstrap can do without a user namespace."""
    return os.geteuid() == 0


def _has_subordinate_ids() -> bool:
    import pwd

    names = {str(os.geteuid())}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(os.geteuid()).pw_name)
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in names for line in lines)
