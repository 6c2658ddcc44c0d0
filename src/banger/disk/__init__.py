"""Disk room: blank ext4 templates, initrds, squashfs files, and the thread that long work runs in.

Everything here makes files that a guest reads. Nothing mounts, checks or parses a guest's disk.
"""
