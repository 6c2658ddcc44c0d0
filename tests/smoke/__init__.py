"""The smoke test: the installed project under the real firecracker, in an emulated host."""
