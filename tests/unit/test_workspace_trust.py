"""A repository whose history lies outside of it: whose is it, and may it go into a guest?

The hostile ones name a private repository of the same user; the honest ones are made with git.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.progress import Silent
from banger.workspace.inspect import inspect_repository, precheck
from banger.workspace.options import Mode, ShipOptions
from banger.workspace.pack import pack
from workspace_kit import commit, git, head, make_repository, remove, ship, write

Attack = Callable[[Path, Path], object]


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another repository of the user, and a home for what they configure."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    private = make_repository(tmp_path / "private")
    write(private, "secret", "s3cret")
    commit(private)
    return private


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    evil = make_repository(tmp_path / "evil")
    write(evil, "file", "x")
    commit(evil)
    return evil


def _git_file(evil: Path, private: Path) -> None:
    remove(evil / ".git")
    (evil / ".git").write_text(f"gitdir: {private}/.git\n")


def _git_link(evil: Path, private: Path) -> None:
    remove(evil / ".git")
    (evil / ".git").symlink_to(private / ".git")


def _commondir(evil: Path, private: Path) -> None:
    (evil / ".git/commondir").write_text(f"{private}/.git\n")


def _commondir_with_a_back_link(evil: Path, private: Path) -> None:
    """A worktree in shape, in a place that the attacker owns."""
    (evil / ".git").rename(evil / "git")
    side = evil / "git/worktrees/side"
    side.mkdir(parents=True)
    (side / "HEAD").write_text("ref: refs/heads/main\n")
    (side / "gitdir").write_text(f"{evil}/.git\n")
    (side / "commondir").write_text(f"{private}/.git\n")
    (evil / ".git").write_text(f"gitdir: {side}\n")


def _other_worktree(evil: Path, private: Path) -> None:
    """A worktree of the private repository; its back link leads to where that one is."""
    git(private, "worktree", "add", "-q", "-b", "side", str(private.parent / "side"))
    remove(evil / ".git")
    (evil / ".git").write_text(f"gitdir: {private}/.git/worktrees/side\n")


def _alternates(evil: Path, private: Path) -> None:
    (evil / ".git/objects/info/alternates").write_text(f"{private}/.git/objects\n")
    (evil / ".git/refs/heads/main").write_text(head(private) + "\n")


def _alternates_of_alternates(evil: Path, private: Path) -> None:
    (evil / "o/info").mkdir(parents=True)
    (evil / "o/info/alternates").write_text(f"{private}/.git/objects\n")
    (evil / ".git/objects/info/alternates").write_text('"../../\\157"\n')
    (evil / ".git/refs/heads/main").write_text(head(private) + "\n")


def _linked_objects(evil: Path, private: Path) -> None:
    for name in ("objects", "refs"):
        remove(evil / ".git" / name)
        (evil / ".git" / name).symlink_to(private / ".git" / name)


def _link_to_links(evil: Path, private: Path) -> None:
    """The first link stays inside, the second does not."""
    remove(evil / ".git/objects")
    (evil / "o").mkdir()
    (evil / ".git/objects").symlink_to("../o")
    for made in (private / ".git/objects").iterdir():
        (evil / "o" / made.name).symlink_to(made)
    (evil / ".git/refs/heads/main").write_text(head(private) + "\n")


def _linked_packs(evil: Path, private: Path) -> None:
    git(private, "repack", "-adq")
    (evil / ".git/objects/pack").rmdir()
    (evil / ".git/objects/pack").symlink_to(private / ".git/objects/pack")
    (evil / ".git/refs/heads/main").write_text(head(private) + "\n")


def _linked_refs(evil: Path, private: Path) -> None:
    git(private, "pack-refs", "--all")
    (evil / ".git/packed-refs").symlink_to(private / ".git/packed-refs")


def _both_ends(evil: Path, private: Path) -> None:
    """An archive that brings a main repository along, which borrows what is not its own."""
    main = evil.parent / "main"
    evil.rename(main)
    git(main, "worktree", "add", "-q", "-b", "side", str(evil))
    remove(main / ".git/objects/info")
    _linked_objects(main, private)
    (main / ".git/worktrees/evil/HEAD").write_text("ref: refs/heads/main\n")


ATTACKS = [
    _git_file, _git_link, _commondir, _commondir_with_a_back_link, _other_worktree, _alternates,
    _alternates_of_alternates, _linked_objects, _link_to_links, _linked_packs, _linked_refs,
    _both_ends,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_history_of_another_repository_stays_out(attack: Attack, evil: Path, private: Path) -> None:
    attack(evil, private)
    with pytest.raises(BangerError) as caught:
        precheck(evil, ShipOptions())
    error = caught.value
    assert error.reason == "foreign_history", error
    assert str(evil) in error.message and str(private) in error.message
    assert error.hint is not None and str(evil) in error.hint


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_nested_repository_does_not_bring_it_either(
    attack: Attack, evil: Path, private: Path, tmp_path: Path
) -> None:
    """A full copy takes the `.git` of what lies inside along."""
    outer = make_repository(tmp_path / "outer")
    write(outer, "file", "x")
    commit(outer)
    attack(evil, private)
    evil.rename(outer / "inner")
    if attack in (_commondir_with_a_back_link, _both_ends):
        for file in outer.rglob("gitdir"):
            file.write_text(f"{outer}/inner/.git\n")
    warnings: list[str] = []

    class Listening(Silent):
        def warn(self, message: str) -> None:
            warnings.append(message)

    options = ShipOptions(mode="full_copy")
    out = io.BytesIO()
    pack(precheck(outer, options), options, out, reporter=Listening())
    assert any("without its" in w for w in warnings), warnings
    assert b"inner/.git/" not in out.getvalue()


@pytest.mark.parametrize("mode", ["shallow_overlay", "metadata_only", "full_copy"])
def test_user_can_say_that_it_is_theirs(evil: Path, private: Path, mode: Mode) -> None:
    """`git init --separate-git-dir`: git sets no link that leads back."""
    separate = evil.parent / "elsewhere.git"
    git(evil, "init", "-q", "--separate-git-dir", str(separate))
    with pytest.raises(BangerError) as caught:
        inspect_repository(evil)
    hint = caught.value.hint
    assert hint == f"git config --global --add banger.trustedRepository {evil}"
    _configure(evil, str(evil))
    assert ship(evil, evil.parent, ShipOptions(mode=mode)).fsck() == "0"


@pytest.mark.parametrize("trusted", ["*", "{parent}/*", "{parent}/evil/"])
def test_patterns_trust_more_than_one(evil: Path, private: Path, trusted: str) -> None:
    _git_file(evil, private)
    _configure(private, trusted.format(parent=evil.parent))
    inspect_repository(evil)


def test_allowed_repository_has_its_configuration_from_where_it_lies(
    evil: Path, private: Path
) -> None:
    """As contrib's git-new-workdir makes it: everything a link."""
    git(private, "remote", "add", "origin", "https://example.org/private")
    git(private, "config", "core.autocrlf", "input")
    for name in ("config", "refs", "objects"):
        path = evil / ".git" / name
        remove(path) if path.is_dir() else path.unlink()
        path.symlink_to(private / ".git" / name)
    _configure(private, str(evil))
    found = inspect_repository(evil)
    assert (found.origin, found.head_commit) == ("https://example.org/private", head(private))
    assert found.setting("core.autocrlf") == "input"


@pytest.mark.parametrize("trusted", ["", "/", "{parent}", "{parent}/ev*", "{parent}/evil/*", "{0}"])
def test_what_names_another_trusts_nothing(evil: Path, private: Path, trusted: str) -> None:
    _git_file(evil, private)
    _configure(private, trusted.replace("{0}", str(private)).format(parent=evil.parent))
    with pytest.raises(BangerError, match="history"):
        inspect_repository(evil)


def test_repository_cannot_trust_itself(evil: Path, private: Path, tmp_path: Path) -> None:
    _alternates(evil, private)
    git(evil, "config", "banger.trustedRepository", "*")
    (tmp_path / "included").write_text("[banger]\n\ttrustedRepository = *\n")
    git(evil, "config", "include.path", str(tmp_path / "included"))
    with pytest.raises(BangerError, match="history"):
        inspect_repository(evil)


def test_borrowed_objects_are_the_users_word(private: Path, tmp_path: Path) -> None:
    """`git clone --shared` and `--reference`: what lends knows nothing of it."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--shared", str(private), str(clone))
    with pytest.raises(BangerError) as caught:
        inspect_repository(clone)
    assert f"{private}/.git/objects" in caught.value.message
    git(clone, "worktree", "add", "-q", str(tmp_path / "side"))
    _configure(private, str(clone))
    # The main repository's word counts for its worktrees.
    for place in (clone, tmp_path / "side"):
        assert ship(place, tmp_path).fsck() == "0"


@pytest.mark.parametrize("back", ["fifo", "loop", "nul", "directory", "nothing"])
def test_back_link_that_leads_nowhere_is_none(back: str, evil: Path, private: Path) -> None:
    _other_worktree(evil, private)
    gitdir = private / ".git/worktrees/side/gitdir"
    gitdir.unlink()
    if back == "fifo":
        os.mkfifo(gitdir)
    elif back == "loop":
        (evil / "loop").symlink_to("loop")
        gitdir.write_text(f"{evil}/loop/.git\n")
    elif back == "nul":
        gitdir.write_bytes(os.fsencode(evil) + b"\0/.git\n")
    elif back == "directory":
        gitdir.mkdir()
    with pytest.raises(BangerError, match="history"):
        inspect_repository(evil)


def test_configuration_of_another_repository_is_not_taken_over(
    evil: Path, private: Path, tmp_path: Path
) -> None:
    """Its origin and identity are nobody's business; what is included from inside counts."""
    git(private, "remote", "add", "origin", "https://example.org/private")
    git(private, "config", "user.name", "Eve")
    write(evil, "shared.config", "[user]\n\temail = shared@example.org\n")
    git(evil, "config", "include.path", "../shared.config")
    (evil / "link").symlink_to(private / ".git/config")
    for included in (f"{private}/.git/config", "../link"):
        git(evil, "config", "--add", "include.path", included)
    (tmp_path / "home/more").write_text("[user]\n\tname = Mine\n")
    (tmp_path / "home/.gitconfig").write_text("[include]\n\tpath = more\n")
    git(evil, "config", "--unset", "user.name")
    (evil / "sub").mkdir()
    found = inspect_repository(evil / "sub")
    assert (found.origin, found.user_name) == (None, "Mine")
    assert found.user_email == "shared@example.org"


def test_loop_of_links_among_what_git_reads_is_no_traceback(evil: Path, private: Path) -> None:
    (evil / ".git/logs/loop").symlink_to("loop")
    (evil / ".git/info/up").symlink_to("..")
    assert inspect_repository(evil).head_commit == head(evil)


def test_links_and_lenders_inside_are_its_own(evil: Path, private: Path) -> None:
    write(evil, "lender/file", "y")
    lender = make_repository(evil / "lender/repository")
    commit(lender)
    (evil / ".git/objects/info/alternates").write_text(f"{lender}/.git/objects\n")
    (evil / ".git/HEAD").unlink()
    (evil / ".git/HEAD").symlink_to("refs/heads/main")
    (evil / ".git/hooks").rename(evil / "hooks")
    (evil / ".git/hooks").symlink_to("/usr/share/git-core/templates/hooks")
    assert inspect_repository(evil).head_commit == head(evil)


def test_submodule_in_its_superproject_and_in_a_worktree_of_it(
    private: Path, tmp_path: Path
) -> None:
    """The git directory of a submodule says where its work tree is."""
    outer = make_repository(tmp_path / "outer")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(private), "sub")
    commit(outer)
    side = tmp_path / "side"
    git(outer, "worktree", "add", "-q", str(side))
    git(side, "-c", "protocol.file.allow=always", "submodule", "-q", "update", "--init")
    inner_side = tmp_path / "inner-side"
    git(outer / "sub", "worktree", "add", "-q", str(inner_side))
    for place in (outer / "sub", side / "sub", inner_side):
        assert (ship(place, tmp_path).copy / "secret").read_text() == "s3cret"


def test_worktree_of_a_bare_repository_beside_it(private: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(private), str(tmp_path / "project/.bare"))
    (tmp_path / "project/.git").write_text("gitdir: ./.bare\n")
    git(tmp_path / "project", "worktree", "add", "-q", str(tmp_path / "project/main"))
    assert ship(tmp_path / "project/main", tmp_path).fsck() == "0"


def test_worktree_that_was_moved_by_hand_is_repaired_first(private: Path, tmp_path: Path) -> None:
    git(private, "worktree", "add", "-q", str(tmp_path / "side"))
    (tmp_path / "side").rename(tmp_path / "moved")
    with pytest.raises(BangerError) as caught:
        inspect_repository(tmp_path / "moved")
    assert caught.value.hint == f"git -C {tmp_path}/moved worktree repair"
    git(tmp_path / "moved", "worktree", "repair")
    assert inspect_repository(tmp_path / "moved").branch == "side"


def _configure(anywhere: Path, value: str) -> None:
    """In the user's own file, which is below the HOME of the test."""
    home = anywhere.parent / "home"
    git(anywhere, "config", "-f", str(home / ".gitconfig"), "banger.trustedRepository", value)
