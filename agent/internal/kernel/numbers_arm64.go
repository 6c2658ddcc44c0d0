package kernel

import "syscall"

// System call numbers that package syscall, which is frozen, does not have.
// Source: Linux, include/uapi/asm-generic/unistd.h.
const (
	sysFstatat     = syscall.SYS_FSTATAT
	sysSyncfs      = 267
	sysFinitModule = 273
	sysRenameat2   = 276
	sysMemfdCreate = 279
	sysFsconfig    = 431
	sysFspick      = 433
	sysPidfdOpen   = 434
	sysOpenat2     = 437
)
