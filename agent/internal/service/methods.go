package service

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/guest"
	"banger/agent/internal/wire"
)

// dispatch answers the request. An error it returns has not been sent yet.
func (c *call) dispatch() error {
	unary := map[string]func(*call) (any, error){
		"hello":     (*call).hello,
		"activity":  (*call).activity,
		"health":    (*call).health,
		"ports":     (*call).ports,
		"stat":      (*call).stat,
		"place":     (*call).place,
		"stats":     (*call).stats,
		"sync":      (*call).sync,
		"time":      (*call).time,
		"entropy":   (*call).entropy,
		"configure": (*call).configure,
		"grow":      (*call).grow,

		"packages": (*call).packages,

		"missing":        (*call).missing,
		"session.start":  (*call).sessionStart,
		"session.list":   (*call).sessionList,
		"session.show":   (*call).sessionShow,
		"session.remove": (*call).sessionRemove,
		"session.stop":   (*call).sessionStop,
		"session.kill":   (*call).sessionKill,
	}
	streams := map[string]func(*call) error{
		"exec":     (*call).exec,
		"put":      (*call).put,
		"get":      (*call).get,
		"scan":     (*call).scan,
		"install":  (*call).install,
		"capture":  (*call).capture,
		"digest":   (*call).digest,
		"read":     (*call).read,
		"put_file": (*call).putFile,
		"dial":     (*call).dial,
		"shutdown": (*call).shutdown,

		"session.logs":   (*call).sessionLogs,
		"session.attach": (*call).sessionAttach,
		"session.send":   (*call).sessionSend,
	}
	if method, ok := unary[c.req.Method]; ok {
		result, err := method(c)
		if err != nil {
			return err
		}
		return c.answer(result)
	}
	if method, ok := streams[c.req.Method]; ok {
		c.streams.Add(1)
		defer c.streams.Add(-1)
		return method(c)
	}
	return wire.Errorf(wire.UnknownMethod, "the agent knows no method %q", c.req.Method)
}

func (c *call) params(v any) error { return wire.DecodeParams(c.req.Method, c.req.Params, v) }

// answer sends the result line. Nothing can be said to a peer that has gone.
func (c *call) answer(result any) error {
	raw, err := json.Marshal(result)
	if err != nil {
		return err
	}
	if err := wire.WriteJSONLine(c.conn, wire.Reply{Result: raw, OpID: c.req.OpID}); err != nil {
		c.Log("%s: answering: %v", c.req.Method, err)
	}
	return nil
}

type none struct{}

// identity is the result of hello and the params of announce.
type identity struct {
	VMID         string `json:"vm_id"`
	BootID       string `json:"boot_id"`
	AgentVersion string `json:"agent_version"`
	Protocol     int    `json:"protocol"`
}

func (s *Server) identity() identity {
	return identity{s.Config.VMID, s.BootID, s.Version, wire.Version}
}

func (c *call) hello() (any, error) {
	return c.identity(), c.params(&none{})
}

func (c *call) health() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	uptime, err := readUptime()
	if err != nil {
		return nil, err
	}
	kind, state := c.Machine.Init()
	return map[string]any{
		"agent_version": c.Version, "protocol": wire.Version, "boot_id": c.BootID,
		"uptime_s": uptime, "hostname": hostname, "init": kind, "init_state": state,
		"first_boot": c.Machine.FirstBoot(),
	}, nil
}

func (c *call) sync() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	syscall.Sync()
	return none{}, nil
}

func (c *call) time() (any, error) {
	var p struct {
		UnixNs int64 `json:"unix_ns"`
	}
	if err := c.params(&p); err != nil {
		return nil, err
	}
	if p.UnixNs <= 0 {
		return nil, wire.Errorf(wire.BadRequest, "time: unix_ns is missing or not positive")
	}
	before := time.Now().UnixNano()
	stepped, err := c.Machine.StepClock(p.UnixNs)
	if err != nil {
		return nil, err
	}
	return map[string]any{"before_unix_ns": before, "stepped": stepped}, nil
}

func (c *call) entropy() (any, error) {
	var p struct {
		Seed string `json:"seed"`
	}
	if err := c.params(&p); err != nil {
		return nil, err
	}
	seed, err := base64.StdEncoding.DecodeString(p.Seed)
	if err != nil {
		return nil, wire.Errorf(wire.BadRequest, "entropy: seed: %v", err)
	}
	if len(seed) < 32 || len(seed) > 512 {
		return nil, wire.Errorf(wire.BadRequest,
			"entropy: seed has %d bytes, 32 to 512 are allowed", len(seed))
	}
	return none{}, c.Machine.AddEntropy(seed)
}

func (c *call) configure() (any, error) {
	var p Settings
	if err := c.params(&p); err != nil {
		return nil, err
	}
	var err error
	if p.Hostname != nil {
		err = guest.CheckHostname(*p.Hostname)
	}
	if err == nil && p.DNS != nil {
		err = guest.CheckDNS(*p.DNS)
	}
	if err == nil && p.AuthorizedKeys != nil {
		err = guest.CheckKeys(*p.AuthorizedKeys)
	}
	if err != nil {
		return nil, wire.Errorf(wire.BadRequest, "configure: %v", err)
	}
	return none{}, c.Machine.Configure(p)
}

func (c *call) grow() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	grown, err := c.Machine.Grow()
	if grown == nil {
		grown = []GrownFilesystem{}
	}
	return map[string]any{"filesystems": grown}, err
}

// shutdown answers first, with everything sent, because the machine may end at any moment after.
func (c *call) shutdown() error {
	p := struct {
		GraceS float64 `json:"grace_s"`
	}{GraceS: 10}
	if err := c.params(&p); err != nil {
		return err
	}
	if err := checkGrace("shutdown", p.GraceS); err != nil {
		return err
	}
	if err := c.answer(none{}); err != nil {
		return err
	}
	_ = c.conn.CloseWrite()
	c.Log("the host asked for a shutdown within %g s", p.GraceS)
	go c.Machine.Stop(time.Duration(p.GraceS * float64(time.Second)))
	return nil
}

func checkGrace(method string, seconds float64) error {
	if seconds < 0 || seconds > 3600 {
		return wire.Errorf(wire.BadRequest, "%s: grace_s is not between 0 and 3600", method)
	}
	return nil
}

// readUptime returns the seconds since boot.
func readUptime() (float64, error) {
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), " ")
	return strconv.ParseFloat(first, 64)
}

// ReadBootID returns the kernel's id of this boot.
func ReadBootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}
