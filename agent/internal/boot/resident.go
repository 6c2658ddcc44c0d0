package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/internal/command"
	"banger/agent/internal/disk"
	"banger/agent/internal/guest"
	"banger/agent/internal/halt"
	"banger/agent/internal/kernel"
	"banger/agent/internal/procs"
	"banger/agent/internal/service"
	"banger/agent/internal/session"
)

const (
	// initStateWait bounds asking the init for its state.
	initStateWait = 2 * time.Second
	// clockTolerance is the difference up to which a clock is left alone.
	clockTolerance = time.Second
	// maxFiles are the limits of open files for commands; the kernel's default is too low for many
	// build tools, and login services of an init raise it the same way.
	softFiles, hardFiles = 65536, 524288
	// ownOOMScore keeps the agent from being the process that a full memory ends.
	ownOOMScore = "-900"
	// sessionsDir is kept over stop and start: what has ended can be looked at.
	sessionsDir = "/var/lib/banger/sessions"
)

// resident is the service in the guest: the server and the machine it acts on.
type resident struct {
	handover
	server *service.Server
	reaper *procs.Reaper
	log    func(string, ...any)

	mu   sync.Mutex
	over int // root of the overlay disk
	stop sync.Once
	// firstBoot is how the installation of sshd goes: running, done, failed; nothing without one.
	firstBoot atomic.Value
}

// ServeGuest is the service beside the image's init; it ends with the machine, or on SIGTERM, which
// the init sends to all that is left when it shuts down.
func ServeGuest(version string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	file := os.NewFile(handoverFd, "handover")
	text, err := io.ReadAll(io.LimitReader(file, 2*guest.MaxConfig))
	file.Close()
	if err != nil {
		return fmt.Errorf("reading the handover: %w", err)
	}
	var h handover
	if err := json.Unmarshal(text, &h); err != nil {
		return fmt.Errorf("reading the handover: %w", err)
	}
	syscall.CloseOnExec(overFd)
	g, err := newGuest(h, version, overFd, kernelLog)
	if err != nil {
		return err
	}
	if err := g.start(); err != nil {
		return err
	}
	for sig := range signals {
		if sig == syscall.SIGTERM {
			syscall.Sync()
			return nil
		}
	}
	return nil
}

func newGuest(h handover, version string, over int, log func(string, ...any)) (*resident, error) {
	bootID, err := service.ReadBootID()
	if err != nil {
		return nil, err
	}
	limit := syscall.Rlimit{Cur: softFiles, Max: hardFiles}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		log("raising the limit of open files: %v", err)
	}
	g := &resident{handover: h, log: log, over: over, reaper: procs.NewReaper()}
	// "exe" is what the kernel took from the path it was started by.
	if err := os.WriteFile("/proc/self/comm", []byte("banger-agent"), 0); err != nil {
		log("setting the process name: %v", err)
	}
	g.server = &service.Server{
		Config: h.Config, Version: version, BootID: bootID, Reaper: g.reaper, Machine: g, Log: log,
		Host: command.Host{Root: "/", VMName: h.Config.Name, Image: h.Config.Image},
	}
	g.server.Sessions = &session.Store{Dir: sessionsDir, BootID: bootID, Host: g.server.Host,
		Reaper: g.reaper}
	if h.Config.Transport.Kind == "tcp" {
		g.server.Token = h.Config.Token
	}
	if os.WriteFile("/proc/self/oom_score_adj", []byte(ownOOMScore), 0) == nil {
		// Commands inherit it; they are what should be ended instead.
		g.server.Started = func(pid int) {
			_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("0"), 0)
		}
	}
	return g, nil
}

// start listens, and announces in the background.
func (g *resident) start() error {
	listen, announce, peer, err := addresses(g.Config)
	if err != nil {
		return err
	}
	l, err := service.Listen(listen, peer)
	if err != nil {
		return fmt.Errorf("listening for the host: %w", err)
	}
	go func() {
		if err := g.server.Serve(l); err != nil {
			g.log("%v", err)
		}
	}()
	go func() {
		if err := g.server.Announce(context.Background(), announce); err != nil {
			g.log("%v", err)
			return
		}
		g.log("announced to the host after %s", uptime())
	}()
	if g.Config.InstallSSHD {
		go g.installSSHD()
	}
	return nil
}

// addresses reads the transport of a checked configuration.
func addresses(c *guest.Config) (listen, announce service.Address, peer netip.Addr, err error) {
	t := c.Transport
	if t.Kind == "vsock" {
		return service.Address{Kind: "vsock", Port: t.ListenPort},
			service.Address{Kind: "vsock", Port: t.AnnouncePort}, peer, nil
	}
	peer, err = netip.ParseAddr(t.Peer)
	if err != nil {
		return listen, announce, peer, err
	}
	announce, err = service.ParseAddress("tcp:" + t.Announce)
	return service.Address{Kind: "tcp", Host: fmt.Sprintf("0.0.0.0:%d", t.ListenPort)},
		announce, peer, err
}

// Init implements service.Machine.
func (g *resident) Init() (kind, state string) {
	kind = g.handover.Init
	switch kind {
	case "systemd":
		return kind, g.systemdState()
	case "openrc":
		if !openrcDone("/run/openrc") {
			return kind, "starting"
		}
	case "runit":
		if !isRunning("runsvdir") {
			return kind, "starting"
		}
	}
	return kind, "running"
}

// systemdState asks systemd; its exit status is not 0 in every state but running.
func (g *resident) systemdState() string {
	ctx, cancel := context.WithTimeout(context.Background(), initStateWait)
	defer cancel()
	for _, path := range []string{"/usr/bin/systemctl", "/bin/systemctl"} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		out, err := g.reaper.Run(ctx, path, "is-system-running")
		if state := strings.TrimSpace(out); state != "" && state != "offline" {
			return state
		}
		if err != nil && ctx.Err() != nil {
			return "unknown"
		}
		return "initializing" // not answering yet
	}
	return "unknown"
}

// openrcDone tells whether OpenRC has left its boot runlevels; dir is its state directory.
func openrcDone(dir string) bool {
	level, err := os.ReadFile(dir + "/softlevel")
	if err != nil {
		return false
	}
	if _, err := os.Stat(dir + "/rc.starting"); err == nil {
		return false
	}
	name := strings.TrimSpace(string(level))
	return name != "sysinit" && name != "boot"
}

func isRunning(name string) bool {
	matches, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, path := range matches {
		if text, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(text)) == name {
			return true
		}
	}
	return false
}

// StepClock implements service.Machine.
func (g *resident) StepClock(unixNs int64) (bool, error) {
	if off := time.Duration(unixNs - time.Now().UnixNano()).Abs(); off <= clockTolerance {
		return false, nil
	}
	return true, setClock(unixNs)
}

// Configure implements service.Machine.
func (g *resident) Configure(s service.Settings) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	if s.Hostname != nil {
		g.Config.Hostname = *s.Hostname
		errs = append(errs, syscall.Sethostname([]byte(*s.Hostname)),
			guest.WriteHostname("/", *s.Hostname), guest.WriteHosts("/", g.Config))
	}
	if s.DNS != nil {
		errs = append(errs, guest.WriteResolvConf("/", *s.DNS))
	}
	if s.AuthorizedKeys != nil {
		errs = append(errs, guest.WriteAuthorizedKeys("/", *s.AuthorizedKeys))
	}
	return errors.Join(errs...)
}

// Grow implements service.Machine.
func (g *resident) Grow() ([]service.GrownFilesystem, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	work := g.openWork()
	if work >= 0 {
		defer syscall.Close(work)
	}
	all := []struct {
		path, device string
		fd           int
	}{{"/", g.Config.Mounts.Overlay, g.over}, {"/root", g.Config.Mounts.Work, work}}
	var grown []service.GrownFilesystem
	for _, f := range all {
		if f.device == "" || f.fd < 0 {
			continue
		}
		size, err := disk.Grow(f.device, f.fd)
		if err != nil {
			return grown, err
		}
		grown = append(grown, service.GrownFilesystem{
			Path: f.path, BeforeBytes: size.Before, AfterBytes: size.After})
	}
	return grown, nil
}

// openWork opens the work disk's root, -1 without a work disk. It is not held open: the init could
// not unmount it.
func (g *resident) openWork() int {
	if !g.Work {
		return -1
	}
	fd, err := syscall.Open("/root", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		g.log("opening /root: %v", err)
		return -1
	}
	return fd
}

// Filesystems implements service.Machine.
func (g *resident) Filesystems() []string {
	if g.Work {
		return []string{"/", "/root"}
	}
	return []string{"/"}
}

// AddEntropy implements service.Machine.
//
// Source: random(4), RNDADDENTROPY and RNDRESEEDCRNG.
func (g *resident) AddEntropy(seed []byte) error {
	const rndAddEntropy, rndReseedCrng, mostBytes = 0x40085203, 0x5207, 512
	var pool struct {
		bits, size int32
		data       [mostBytes]byte
	}
	pool.bits, pool.size = int32(8*len(seed)), int32(copy(pool.data[:], seed))
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	defer f.Close()
	if err := kernel.Ioctl(int(f.Fd()), rndAddEntropy, unsafe.Pointer(&pool)); err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	if err := kernel.IoctlValue(int(f.Fd()), rndReseedCrng, 0); err != nil {
		return fmt.Errorf("reseeding the generator: %w", err)
	}
	return nil
}

// writable opens the roots of the ext4 filesystems, for the end of the machine.
func (g *resident) writable() []int {
	if work := g.openWork(); work >= 0 {
		return []int{g.over, work}
	}
	return []int{g.over}
}

// FirstBoot implements service.Machine.
func (g *resident) FirstBoot() string {
	state, _ := g.firstBoot.Load().(string)
	return state
}

// Settle implements service.Machine.
func (g *resident) Settle(grace time.Duration) {
	halt.New(g.reaper, g.handover.Init, g.writable, g.log).Settle(g.handover.Init, grace)
}

// Stop implements service.Machine. Of several requests the first counts.
func (g *resident) Stop(grace time.Duration) {
	g.stop.Do(func() {
		system := halt.New(g.reaper, g.handover.Init, g.writable, g.log)
		if image := g.Config.Image; image != nil && g.handover.Init == "agent" {
			system.First, _ = command.ParseSignal(image.StopSignal)
		}
		if err := system.Stop(g.handover.Init, grace); err != nil {
			g.log("stopping: %v", err)
		}
	})
}
