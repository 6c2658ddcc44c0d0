"""What is done in a guest's workspace comes back; what is done outside goes in. Each scenario has
a repository of its own, because they change it; the VM is one."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import banger, expect
from tests.smoke.registry import Skipped, scenario

_VM = "desk"
# Mode, symlink, binary, rename, deletion, a name that has to be quoted, an ignored file.
_WORK = r"""
set -e
chmod 755 plain; ln -s plain link; head -c 5000 /dev/urandom > blob; mv moved "new name"; rm gone
printf 'x\r\n' > "$(printf 'odd\n"name')"; echo secret > ignored
"""


def _vm() -> str:
    """A VM for the scenarios of this module, on whichever host they run."""
    return guests.shared(_VM)


def _repository(name: str) -> Path:
    """A new repository of the owner's with one commit."""
    path = banger.home / name
    shutil.rmtree(path, ignore_errors=True)
    script = (
        f"mkdir {name} && cd {name} && git init -q -b main && echo plain > plain && echo a > moved"
        " && echo b > gone && echo ignored > .gitignore && git add . && git commit -qm first"
    )
    identity = [f"-c user.{key}" for key in ("name=smoke", "email=smoke@host")]
    script = script.replace("git commit", f"git {' '.join(identity)} commit")
    done = banger.run("sh", "-c", script)
    expect(done.status == 0, f"making the repository: {done.err}")
    return path


def _git(path: Path, *arguments: str, stdin: str = "") -> str:
    identity = ("-c", "user.name=smoke", "-c", "user.email=smoke@host")
    done = banger.run("git", "-C", str(path), *identity, *arguments, stdin=stdin)
    expect(done.status == 0, f"git {arguments[0]}: {done.err}")
    return done.out


def _prepared(name: str, *options: str) -> tuple[str, Path, str]:
    vm, path, place = _vm(), _repository(name), f"/root/{name}"
    banger("vm", "workspace", "prepare", vm, str(path), "--guest-path", place, *options)
    return vm, path, place


def _tree_with(path: Path, patch: Path) -> str:
    """The names, modes and contents that a patch makes of the repository's commit."""
    _git(path, "apply", "--binary", "--index", str(patch))
    return _git(path, "ls-files", "-s")


@scenario("repodir", "a guest's work is a patch that applies: mode, symlink, binary, rename, "
          "deletion; `apply` does the same")  # fmt: skip
def workspace_export() -> None:
    vm, path, place = _prepared("export")
    where = ("--guest-path", place)
    expect(banger("vm", "workspace", "export", vm, *where) == "", "no work gives a patch")
    banger("vm", "exec", *where, vm, "--", "sh", "-c", _WORK)
    patch = banger.home / "export.patch"
    banger("vm", "workspace", "export", vm, *where, "-o", str(patch))
    clone = banger.home / "export-clone"
    shutil.rmtree(clone, ignore_errors=True)
    _git(path, "clone", "-q", ".", str(clone))
    listed = _tree_with(clone, patch)
    for line in ("100755", "120000", "new name", '"odd\\n\\"name"', "blob"):
        expect(line in listed, f"{line} is not in {listed!r}")
    for line in ("gone", "moved", "ignored"):
        names = [entry.rpartition("\t")[2] for entry in listed.splitlines()]
        expect(line not in names, f"{line} is in {listed!r}")
    banger("vm", "workspace", "apply", vm, *where)
    _git(path, "add", "-A")
    expect(_git(path, "ls-files", "-s") == listed, "apply and the patch differ")


@scenario("repodir", "the same from a guest without git; exports of tar and of nothing to commit")
def export_no_git() -> None:
    vm, path, place = _prepared("no-git")
    where = ("--guest-path", place)
    banger("vm", "exec", *where, vm, "--", "sh", "-c", "! command -v git && echo new > new")
    patch = banger.home / "no-git.patch"
    banger("vm", "workspace", "export", vm, *where, "-o", str(patch))
    expect("\tnew" in _tree_with(path, patch), "the new file is not in the patch")
    archive = banger.home / "no-git.tar"
    banger("vm", "workspace", "export", vm, *where, "--format", "tar", "-o", str(archive))
    names = set(banger.run("tar", "-tf", str(archive)).out.split())
    expect({"plain", "new", ".gitignore"} <= names, f"the tar holds {names}")


@scenario("repodir", "guest commits are in the patch by default and with the base, not with HEAD")
def export_base() -> None:
    vm, path, place = _prepared("base")
    where = ("--guest-path", place)
    # The small image has no git; the host's runs there.
    banger("vm", "cp", "/usr/bin/git", f"{vm}:/opt/git")
    if banger.done("vm", "exec", vm, "--", "/opt/git", "--version").status != 0:
        raise Skipped("the host's git does not run in the guest's image")
    identity = "-c user.name=guest -c user.email=guest@vm"
    script = f"echo one >> plain; /opt/git {identity} commit -qam 'In the guest'; echo two >> moved"
    banger("vm", "exec", *where, vm, "--", "sh", "-c", script)
    base = _git(path, "rev-parse", "HEAD").strip()
    for options in ((), ("--base-commit", base)):
        patch = banger("vm", "workspace", "export", vm, *where, *options)
        expect("+one" in patch and "+two" in patch, f"the patch is {patch!r}")
    banger("vm", "exec", vm, "--", "ln", "-s", "/opt/git", "/usr/local/bin/git")
    patch = banger("vm", "workspace", "export", vm, *where, "--base-commit", "HEAD")
    expect("+one" not in patch and "+two" in patch, f"the patch is {patch!r}")
    bundle = banger.home / "base.bundle"
    banger("vm", "workspace", "export", vm, *where, "--format", "commits", "-o", str(bundle))
    banger("vm", "exec", vm, "--", "rm", "/opt/git", "/usr/local/bin/git")
    _git(path, "pull", "-q", "--ff-only", str(bundle))
    expect(_git(path, "log", "-1", "--format=%an: %s").strip() == "guest: In the guest", "the log")


@scenario("repodir", "`--readonly` leaves no write bits in the checkout, its top included")
def prepare_readonly() -> None:
    vm, _, place = _prepared("readonly", "--readonly")
    find = f"find {place} -path {place}/.git -prune -o ! -type l -perm /222 -print"
    out = banger("vm", "exec", vm, "--", "sh", "-c", find)
    expect(out == "", f"writable: {out!r}")


@scenario("repodir", "`--mode full_copy` ships submodules and ignored files; others refuse them")
def prepare_full_copy() -> None:
    vm, inner = _vm(), _repository("inner")
    path = _repository("full")
    _git(path, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "module")
    _git(path, "commit", "-qm", "module")
    (path / "ignored").write_text("here\n")
    shutil.chown(path / "ignored", banger.user, banger.user)
    prepare = ("vm", "workspace", "prepare", vm, str(path), "--guest-path", "/root/full")
    banger.refused(*prepare, because="submodules")
    banger(*prepare, "--mode", "full_copy")
    out = banger("vm", "exec", "--guest-path", "/root/full", vm, "--", "cat", "ignored",
                 "module/plain")  # fmt: skip
    expect(out == "here\nplain\n", f"stdout is {out!r}")


@scenario("repodir", "directory, status, stale warning, `--auto-prepare`; refused when stopped")
def vm_exec() -> None:
    guests.used_names.add("exec")
    path = _repository("exec")
    banger("vm", "run", "-d", "--name", "exec", str(path))
    done = banger.done("vm", "exec", "exec", "--", "sh", "-c", "pwd; exit 7")
    expect((done.status, done.out) == (7, "/root/repo\n"), f"{done}")
    expect("auto-prepare" not in done.err, "it is called stale")
    done = banger.run("sh", "-c", f"echo newer > {path}/plain")
    _git(path, "commit", "-qam", "newer")
    done = banger.done("vm", "exec", "exec", "--", "cat", "plain")
    expect(done.out == "plain\n" and "--auto-prepare" in done.err, f"{done}")
    done = banger.done("vm", "exec", "--auto-prepare", "exec", "--", "cat", "plain")
    expect((done.out, done.err) == ("newer\n", ""), f"{done}")
    banger("vm", "exec", "exec", "--", "sh", "-c", "echo mine > plain")
    banger.refused("vm", "exec", "--auto-prepare", "exec", "--", "true", because="plain")
    banger("vm", "stop", "exec")
    banger.refused("vm", "exec", "exec", "--", "true", because="stopped")
    banger("vm", "delete", "exec")
