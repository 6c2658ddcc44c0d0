"""Checks of what guests are made of and reached by: agent, image, kernel, ssh."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from banger import __version__
from banger.config.resources import agent_binary
from banger.doctor.check import Check, Finding, failed, passed, warned
from banger.errors import BangerError
from banger.image.entries import find_image
from banger.image.recipe import list_recipes
from banger.kernel.build_recipe import find_build_recipe
from banger.kernel.entries import find_kernel
from banger.kernel.pull import find_catalog_kernel
from banger.ssh.client_config import include_line, is_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.api.records import ImageRecord, KernelRecord
    from banger.doctor.world import World
    from banger.progress import Reporter

_FIX = "banger doctor --fix"


def _look_agent(world: World) -> Iterator[Finding]:
    try:
        path = agent_binary()
    except BangerError as e:
        yield failed(str(e), command=e.hint)
        return
    said = world.ask(str(path), "--version") or ""
    m = re.match(r"banger-vsock-agent (\S+) \(protocol (\d+)\)", said)
    if m is None:
        yield failed(f"{path} does not run here: {said.strip() or 'no answer'}", command=_AGENT)
    elif m[1] != __version__:
        yield failed(f"{path} is version {m[1]}, banger is {__version__}", command=_AGENT)
    else:
        yield passed(f"the guest agent is version {m[1]}, protocol {m[2]}")


_AGENT = "make agent"


def _look_image(world: World) -> Iterator[Finding]:
    name = world.settings.default_image_name
    try:
        image = find_image(world.paths, name)
    except BangerError as e:
        yield failed(f"the default image {name}: {e}", command=e.hint or "banger image list")
        return
    if image is None:
        if name in list_recipes():
            yield passed(f"{name} is not here; the first VM builds it from its recipe")
        else:
            yield failed(
                f"the default image {name} is not here, and no recipe has its name",
                f"recipes: {', '.join(list_recipes())}",
                command=f"$EDITOR {world.config_files[-1]}",
            )
        return
    changed = _changed(Path(image.rootfs_path), image.rootfs_bytes)
    if changed is not None:
        yield failed(
            f"the default image {name}: {changed}",
            command=f"banger image build --force --name {name} --recipe {image.recipe or name}",
        )
    elif image.optional_missing:
        yield warned(
            f"{name} was built without {', '.join(image.optional_missing)}, which could not be had",
            command=f"banger image build --force --name {name} --recipe {image.recipe or name}",
        )
    else:
        yield passed(f"{name} is here ({image.distro}, kernel {image.kernel_ref})")


def _look_kernel(world: World) -> Iterator[Finding]:
    for name, why in _wanted_kernels(world).items():
        try:
            kernel = find_kernel(world.paths, name)
        except BangerError as e:
            yield failed(f"the kernel {name}: {e}", command=f"banger kernel pull {name} --force")
            continue
        if kernel is not None:
            yield _judge_kernel(name, kernel)
        elif find_catalog_kernel(name) is not None:
            yield passed(f"{name} ({why}) is not here; the first VM that needs it fetches it")
        elif find_build_recipe(name) is not None:
            yield _judge_build(world, name, why)
        else:
            yield failed(
                f"the kernel {name} ({why}) is not here, and not in the catalog",
                command="banger kernel list --available",
            )


def _judge_build(world: World, name: str, why: str) -> Finding:
    missing = world.missing_build_tools()
    if missing:
        return failed(
            f"the kernel {name} ({why}) is not here, and what builds it is missing: "
            f"{', '.join(tool.name for tool in missing)}",
            command=f"sudo apt-get install {' '.join(dict.fromkeys(t.apt for t in missing))}",
        )
    return warned(
        f"{name} ({why}) is not here; the first VM that needs it waits minutes for its build",
        command=f"banger kernel build {name}",
    )


def _wanted_kernels(world: World) -> dict[str, str]:
    """The kernels that VMs with defaults boot, and for what."""
    wanted = {world.settings.default_kernel_ref: "default_kernel_ref"}
    image: ImageRecord | None = None
    try:
        image = find_image(world.paths, world.settings.default_image_name)
    except BangerError:
        return wanted
    if image is not None:
        wanted.setdefault(image.kernel_ref, f"of the image {image.name}")
    return wanted


def _judge_kernel(name: str, kernel: KernelRecord) -> Finding:
    for path in (kernel.vmlinux, kernel.initrd, kernel.modules):
        if not Path(path).is_file():
            return failed(f"{path} is missing", command=f"banger kernel pull {name} --force")
    return passed(f"{name} is here (Linux {kernel.kernel_version})")


def _changed(path: Path, size_bytes: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as e:
        return f"{path}: {e.strerror}"
    return None if found == size_bytes else f"{path} has {found} bytes, stored were {size_bytes}"


def _look_key(world: World) -> Iterator[Finding]:
    path, ours = _key(world)
    try:
        st = path.stat()
    except FileNotFoundError:
        yield passed(f"{path} is not there; it is made when the first VM starts")
        return
    except OSError as e:
        yield failed(f"the ssh key {path}: {e.strerror}", command=f"ls -l {path}")
        return
    if st.st_uid != world.uid:
        yield failed(
            f"the ssh key {path} belongs to uid {st.st_uid}", command=f"sudo chown $USER {path}"
        )
    elif st.st_mode & 0o077:
        yield failed(
            f"the ssh key {path} is open to others (mode {stat.S_IMODE(st.st_mode):04o}): ssh "
            "refuses it",
            command=f"chmod 600 {path}",
            fixable=ours,
        )
    elif problem := _unreadable(path):
        yield failed(
            f"the ssh key {path} {problem}",
            "put aside, it is made anew; VMs take it at their next start"
            if ours
            else "name another one as ssh_key_path",
            command=f"mv {path} {path}.old" if ours else f"$EDITOR {world.config_files[-1]}",
        )
    else:
        yield passed(f"{path} can be read, by you alone")


def _key(world: World) -> tuple[Path, bool]:
    """The key that opens guests, and whether banger made it."""
    configured = world.settings.ssh_key_path
    return (Path(configured).expanduser(), False) if configured else (world.paths.ssh_key, True)


def _unreadable(path: Path) -> str | None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        load_ssh_private_key(path.read_bytes(), password=None)
    except TypeError:
        return "has a passphrase, which the daemon cannot type"
    except (OSError, ValueError, UnsupportedAlgorithm) as e:
        return f"cannot be read: {e}"
    return None


def _fix_key(world: World, report: Reporter) -> Iterator[str]:
    path, ours = _key(world)
    if ours and path.is_file() and path.stat().st_uid == world.uid:
        before = stat.S_IMODE(path.stat().st_mode)
        if before & 0o077:
            path.chmod(0o600)
            yield f"changed the mode of {path} from {before:04o} to 0600"


def _look_ssh_config(world: World) -> Iterator[Finding]:
    written = world.paths.ssh_config
    if not written.exists():
        yield passed("plain `ssh NAME.vm` was not asked for (banger ssh-config --install)")
        return
    own = Path.home() / ".ssh" / "config"
    try:
        content = own.read_bytes()
    except OSError:
        content = b""
    # As `ssh-config --install` writes it, or as its user put it there by hand.
    lines = [line.strip().lower() for line in content.splitlines()]
    included = is_installed(content, written) or include_line(written).lower().encode() in lines
    if included:
        yield passed(f"{own} includes {written}")
    else:
        yield warned(
            f"{own} does not include {written}: plain `ssh NAME.vm` does not know VMs",
            command="banger ssh-config --install",
        )


CHECKS = (
    Check(
        name="agent",
        look=_look_agent,
        meaning="the guest agent's binary is there, runs, and is of this version",
        mends="`make agent` in a checkout; installing again elsewhere",
    ),
    Check(
        name="default image",
        look=_look_image,
        meaning="here and unchanged in size, or known by a recipe; parts that could not be had "
        "when it was built",
        mends="`banger image build`, another `default_image_name`",
    ),
    Check(
        name="default kernel",
        look=_look_kernel,
        meaning="`default_kernel_ref` and the default image's kernel: here and complete, or in the "
        "catalog",
        mends="`banger kernel pull`",
    ),
    Check(
        name="ssh key",
        look=_look_key,
        fix=_fix_key,
        meaning="the key that opens guests: yours, 0600, readable without a passphrase",
        mends="`--fix` sets the mode of banger's own key; one that you configured is yours",
    ),
    Check(
        name="ssh_config",
        look=_look_ssh_config,
        meaning="where `banger ssh-config` was used: your `~/.ssh/config` includes its file",
        mends="`banger ssh-config --install`",
    ),
)
