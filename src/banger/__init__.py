"""banger: run work in a sandbox of its own, a real microVM for every command that asks for one."""

__version__ = "0.1.0"
