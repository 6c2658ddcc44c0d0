"""The root helper: the only part of banger that changes the host's network, standard library only.

It runs as root, so it imports nothing that a user could have installed. `banger.host` starts it
and is its only client; see `server` for the protocol and `validate` for what it accepts.
"""

VERSION = 1
