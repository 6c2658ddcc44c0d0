package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/guest"
	"banger/agent/internal/procs"
	"banger/agent/internal/service"
	"banger/agent/internal/session"
	"banger/agent/internal/wire"
)

// serve runs the service on a host until a shutdown request, SIGTERM or SIGINT.
func serve(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	listen := flags.String("listen", "", "where to listen")
	config := flags.String("config", "", "configuration document")
	announce := flags.String("announce", "", "where to announce the agent")
	root := flags.String("root", "/", "where accounts and shells are looked up")
	sessions := flags.String("sessions", "", "directory of the sessions; none are kept without it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *listen == "" || flags.NArg() > 0 {
		return errors.New("serve needs --listen ADDRESS and no other argument")
	}
	c, err := readConfig(*config)
	if err != nil {
		return err
	}
	address, err := service.ParseAddress(*listen)
	if err != nil {
		return err
	}
	peer := netip.Addr{}
	token := ""
	if address.Kind == "tcp" {
		if c.Token == "" {
			return errors.New("listening on tcp needs a configuration document with a token")
		}
		token = c.Token
		if c.Transport.Peer != "" {
			if peer, err = netip.ParseAddr(c.Transport.Peer); err != nil {
				return fmt.Errorf("transport.peer: %w", err)
			}
		}
	}
	bootID, err := service.ReadBootID()
	if err != nil {
		return err
	}
	l, err := service.Listen(address, peer)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	logf := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "banger: "+format+"\n", args...)
	}
	// Commands must not inherit what the caller of this program left open.
	for fd := 3; fd < 1024; fd++ {
		syscall.CloseOnExec(fd)
	}
	reaper := procs.NewReaper()
	server := &service.Server{
		Config: c, Version: version, BootID: bootID, Token: token, Reaper: reaper,
		Machine: host{stop: cancel}, Log: logf,
		Host: command.Host{Root: *root, VMName: c.Name, Image: c.Image, EUID: os.Geteuid()},
	}
	if *sessions != "" {
		server.Sessions = &session.Store{Dir: *sessions, BootID: bootID, Host: server.Host,
			Reaper: reaper}
	}
	if *announce != "" {
		to, err := service.ParseAddress(*announce)
		if err != nil {
			return err
		}
		go func() {
			if err := server.Announce(ctx, to); err != nil {
				logf("%v", err)
			}
		}()
	}
	go func() {
		<-ctx.Done()
		l.Close()
	}()
	return server.Serve(l)
}

// readConfig reads a document without demanding the fields that only a boot needs.
func readConfig(path string) (*guest.Config, error) {
	c := &guest.Config{Schema: 1, VMID: "00000000000000000000000000000000", Name: "host"}
	if path == "" {
		return c, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, guest.MaxConfig+1))
	if err != nil {
		return nil, err
	}
	return guest.ParseConfig(text)
}

// host is a machine that is not ours: nothing of it is changed.
type host struct{ stop func() }

func (host) Init() (string, string) { return "agent", "running" }

func (host) StepClock(int64) (bool, error) { return false, nil }

func (host) Configure(service.Settings) error { return unsupported("configure") }

func (host) Grow() ([]service.GrownFilesystem, error) { return nil, nil }

func (host) Filesystems() []string { return []string{"/"} }

func (host) AddEntropy([]byte) error { return unsupported("entropy") }

func (host) FirstBoot() string { return "" }

func (host) Settle(time.Duration) {}

func (h host) Stop(time.Duration) { h.stop() }

func unsupported(method string) error {
	return &wire.Error{Code: wire.OperationFailed, Reason: "unsupported",
		Message: method + ": this agent serves on a host and leaves it as it is"}
}
