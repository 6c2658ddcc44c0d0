package boot

import (
	"fmt"
	"os"
	"syscall"

	"banger/agent/internal/halt"
)

// console prints single lines for whoever reads the serial console. The device is opened for each:
// a terminal that stays open would be hung up by a getty.
type console struct{}

func (console) Printf(format string, args ...any) {
	// Non-blocking: a console that nobody drains must not stop the boot.
	f, err := os.OpenFile("/dev/console",
		os.O_WRONLY|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return // no console in this machine
	}
	defer f.Close()
	_, _ = f.WriteString("banger: " + fmt.Sprintf(format, args...) + "\n")
}

// fatal says why the boot cannot go on and ends the machine.
func (c console) fatal(err error) {
	c.Printf("boot failed: %v", err)
	syscall.Sync()
	if err := halt.Reboot(); err != nil {
		c.Printf("rebooting: %v", err)
	}
}

// kernelLog writes to the kernel's log, which is no terminal.
func kernelLog(format string, args ...any) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	const info = "<6>"
	_, _ = f.WriteString(info + "banger: " + fmt.Sprintf(format, args...) + "\n")
}

// ConsoleLog prints on the console, for modes of the program that have no boot around them.
func ConsoleLog(format string, args ...any) { console{}.Printf(format, args...) }
