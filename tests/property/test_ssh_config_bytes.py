"""The user's OpenSSH configuration: whatever is in it, all of it stays."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from banger.ssh.client_config import BEGIN, END, add_block, is_installed, remove_block

STANZA = Path("/home/a b/.config/banger/ssh_config")
LINES = st.lists(
    st.sampled_from([b"Host *", b"  User x\r", b"", b"Include other", b"# <<< banger", b"\xff\0"])
    | st.binary(max_size=20),
    max_size=8,
).map(b"\n".join)
FILES = (st.binary(max_size=200) | LINES).filter(lambda c: BEGIN not in c and END not in c)


@given(FILES)
@example(b"")
@example(b"\n")
@example(b"no newline")
def test_every_other_byte_stays(content: bytes) -> None:
    installed = add_block(content, STANZA)
    assert installed.endswith(content)
    assert add_block(installed, STANZA) == installed
    assert is_installed(installed, STANZA)
    assert remove_block(installed) == content
    assert remove_block(content) == content


@given(FILES, FILES)
def test_a_block_between_lines_of_the_user_goes_without_a_trace(above: bytes, below: bytes) -> None:
    above = above + b"\n" if above and not above.endswith(b"\n") else above
    block = add_block(b"", STANZA)
    assert remove_block(above + block + below) == above + below
