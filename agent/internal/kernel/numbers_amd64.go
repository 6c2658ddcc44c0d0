package kernel

import "syscall"

// System call numbers that package syscall, which is frozen, does not have.
// Source: Linux, arch/x86/entry/syscalls/syscall_64.tbl.
const (
	sysFstatat     = syscall.SYS_NEWFSTATAT
	sysSyncfs      = 306
	sysFinitModule = 313
	sysRenameat2   = 316
	sysMemfdCreate = 319
	sysFsconfig    = 431
	sysFspick      = 433
	sysPidfdOpen   = 434
	sysOpenat2     = 437
)
