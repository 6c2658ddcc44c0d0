"""Kernel sources small enough for a unit test: a Makefile that does what Kbuild is asked for.

`allnoconfig` keeps the options of the seed that the Kconfig file defines, `vmlinux` makes an object
file that holds the environment it was built in. What a test wants of a build it says by files in
the directory `steering`, which outlives the tree: `fail`, `full`, `kill`, `hold`; `arrived` is the
answer to the last one.
"""

from __future__ import annotations

import io
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from banger.kernel.requirements import BOOT_MODULES

_MAKEFILE = """\
# SPDX-License-Identifier: GPL-2.0
VERSION = 6
PATCHLEVEL = 12
SUBLEVEL = 9
EXTRAVERSION =
STEERING = @STEERING@

allnoconfig:
	@sed -n 's/^config /CONFIG_/p' Kconfig | sed 's/$$/=/' > known
	@grep -F -f known $$KCONFIG_ALLCONFIG > .config
	@mkdir -p include/config; echo 6.12.9-banger > include/config/kernel.release

vmlinux:
	@echo '  CC      init/main.o'
	@echo '  HOSTCC  scripts/bin2c'
	@echo '  LD      vmlinux.o'
	@echo compiled >> $(STEERING)/compiled
	@if test -e $(STEERING)/fail; then \\
		echo "kernel/fork.c:7:1: error: expected ';'" >&2; \\
		echo 'make[1]: *** [kernel/fork.o] Error 1' >&2; exit 1; fi
	@if test -e $(STEERING)/full; then \
		echo 'as: init/main.o: No space left on device' >&2; exit 1; fi
	@if test -e $(STEERING)/kill; then kill -9 $$PPID; fi
	@if test -e $(STEERING)/hold; then echo > $(STEERING)/arrived; exec sleep 1000; fi
	@{ echo; env | sort | grep -E '^(SOURCE_DATE|KBUILD_|LOCALVERSION|TZ|HOSTNAME_OF)'; } > env.txt
	@cp @OBJECT@ vmlinux
	@objcopy --add-section .env=env.txt --set-section-flags .env=alloc,readonly vmlinux
	@printf 'kernel/x/%s.ko\\n' @BOOT_MODULES@ > modules.builtin
	@printf 'overlay.file=fs/overlayfs/overlay\\000' > modules.builtin.modinfo
"""


class FakeSource:
    """Sources below `root`; the options of a fragment are those that they know."""

    def __init__(self, root: Path, options: Iterable[str]) -> None:
        self.steering = root / "steering"
        self.steering.mkdir()
        code, self._object = root / "empty.c", root / "empty.o"
        code.write_text("int nothing;\n")
        subprocess.run(["gcc", "-c", str(code), "-o", str(self._object)], check=True)
        self.options = set(options)
        self.makefile = _MAKEFILE

    @property
    def compiled(self) -> int:
        """How often `vmlinux` was made."""
        file = self.steering / "compiled"
        return len(file.read_text().split()) if file.exists() else 0

    def say(self, word: str) -> None:
        (self.steering / word).touch()

    def tar(self) -> bytes:
        """The sources as an uncompressed archive, always the same for the same sources."""
        text = self.makefile.replace("@STEERING@", str(self.steering))
        text = text.replace("@OBJECT@", str(self._object))
        text = text.replace("@BOOT_MODULES@", " ".join(BOOT_MODULES))
        kconfig = "".join(f"config {name}\n\tbool\n\n" for name in sorted(self.options))
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, content in (("Makefile", text), ("Kconfig", kconfig)):
                _add(tar, f"linux-source-6.12/{name}", content.encode())
        return out.getvalue()

    def write_package(self, target: Path) -> Path:
        """The Debian package linux-source-6.12 around them."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            _add(tar, "./usr/share/doc/linux-source-6.12/copyright", b"GPL-2")
            _add(tar, "./usr/src/linux-source-6.12.tar.xz", lzma.compress(self.tar()))
        members = (("debian-binary", b"2.0\n"), ("data.tar.xz", lzma.compress(data.getvalue())))
        with target.open("wb") as f:
            f.write(b"!<arch>\n")
            for name, content in members:
                f.write(
                    f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode()
                )
                f.write(content + b"\n" * (len(content) % 2))
        return target

    @staticmethod
    def environment_in(vmlinux: Path) -> dict[str, str]:
        """The environment that a fake kernel was made in."""
        lines = re.findall(rb"^([A-Z_]+)=([^\n\0]*)$", vmlinux.read_bytes(), re.MULTILINE)
        return {name.decode(): value.decode() for name, value in lines}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 1_760_000_000
    tar.addfile(info, io.BytesIO(content))
