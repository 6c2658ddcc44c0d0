"""Doctor: what keeps banger from working here, and the command that mends it.

It runs in the command line's own process, so that it works when nothing else does, and changes
nothing unless `--fix` or `--deep` asks for it.
"""
