// Command banger-vsock-agent is the /init of every guest's initramfs and then the service in the
// guest through which the host runs commands. On a host it serves tests.
//
// Modes: process 1 (no arguments needed), "serve" on a host, "--version". See docs/protocol.md.
package main

import (
	"fmt"
	"os"

	"banger/agent/internal/boot"
	"banger/agent/internal/halt"
	"banger/agent/internal/session"
	"banger/agent/internal/wire"
)

// version is set with -ldflags "-X main.version=…".
var version = "0.0.0-dev"

func main() {
	if os.Getpid() == 1 {
		if os.Args[0] == "/shutdown" {
			fail(halt.Exit(boot.ConsoleLog))
		}
		boot.Main(version)
		os.Exit(1)
	}
	args := os.Args[1:]
	switch {
	case len(args) == 1 && args[0] == "--version":
		fmt.Printf("banger-vsock-agent %s (protocol %d)\n", version, wire.Version)
	case len(args) == 1 && args[0] == boot.ServiceMode:
		if err := boot.ServeGuest(version); err != nil {
			boot.ConsoleLog("the service has ended: %v", err)
			os.Exit(1)
		}
	case len(args) == 2 && args[0] == session.Mode:
		fail(session.Supervise(args[1]))
	case len(args) > 0 && args[0] == "serve":
		fail(serve(args[1:]))
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
}

const usage = `usage:
  banger-vsock-agent --version
  banger-vsock-agent serve --listen ADDRESS [--config FILE] [--announce ADDRESS] [--sessions DIR] [--root DIR]

ADDRESS is unix:PATH, tcp:ADDRESS:PORT or vsock:PORT. As process 1 it boots a guest.
`

func fail(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger-vsock-agent: %v\n", err)
		os.Exit(1)
	}
}
