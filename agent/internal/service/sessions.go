package service

import (
	"errors"
	"io"
	"os"
	"slices"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/session"
	"banger/agent/internal/wire"
)

// mostStopGrace bounds how long a session may take to stop, in seconds.
const mostStopGrace = 3600

// missing tells which programs a command with these params would not find.
func (c *call) missing() (any, error) {
	var p struct {
		Names []string          `json:"names"`
		Cwd   string            `json:"cwd"`
		Env   map[string]string `json:"env"`
		User  string            `json:"user"`
		Login bool              `json:"login"`
	}
	if err := c.params(&p); err != nil {
		return nil, err
	}
	if len(p.Names) == 0 || slices.Contains(p.Names, "") {
		return nil, wire.Errorf(wire.BadRequest, "missing: no names, or an empty one")
	}
	missing, err := command.FindMissing(c.Reaper,
		command.Params{Cwd: p.Cwd, Env: p.Env, User: p.User, Login: p.Login}, c.Host, p.Names)
	if missing == nil {
		missing = []string{}
	}
	return map[string]any{"missing": missing}, err
}

// sessions returns the store, or an error where this agent keeps none.
func (c *call) sessions() (*session.Store, error) {
	if c.Sessions == nil {
		return nil, &wire.Error{Code: wire.OperationFailed, Reason: "unsupported",
			Message: c.req.Method + ": this agent keeps no sessions"}
	}
	return c.Sessions, nil
}

func (c *call) sessionStart() (any, error) {
	var p session.Params
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return nil, err
	}
	return store.Start(p)
}

func (c *call) sessionList() (any, error) {
	store, err := c.sessions()
	if err == nil {
		err = c.params(&none{})
	}
	if err != nil {
		return nil, err
	}
	records, err := store.List()
	if records == nil {
		records = []*session.Record{}
	}
	return map[string]any{"sessions": records}, err
}

type sessionName struct {
	Name string `json:"name"`
}

func (c *call) sessionShow() (any, error) {
	var p sessionName
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return nil, err
	}
	return store.Show(p.Name)
}

func (c *call) sessionRemove() (any, error) {
	var p sessionName
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return nil, err
	}
	return none{}, store.Remove(p.Name)
}

func (c *call) sessionStop() (any, error) {
	p := struct {
		sessionName
		GraceS float64 `json:"grace_s"`
	}{GraceS: 10}
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return nil, err
	}
	if p.GraceS < 0 || p.GraceS > mostStopGrace {
		return nil, wire.Errorf(wire.BadRequest, "session.stop: grace_s is not between 0 and %d",
			mostStopGrace)
	}
	return store.Stop(p.Name, time.Duration(p.GraceS*float64(time.Second)))
}

func (c *call) sessionKill() (any, error) {
	p := struct {
		sessionName
		Signal string `json:"signal"`
	}{Signal: "KILL"}
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return nil, err
	}
	return store.Kill(p.Name, p.Signal)
}

func (c *call) sessionLogs() error {
	var p session.LogParams
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err == nil {
		_, err = store.Find(p.Name)
	}
	if err != nil {
		return err
	}
	if err := c.stream(); err != nil {
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, c.in)
	}()
	end, err := store.Logs(p, out, gone)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // the client has gone
	}
	c.finish(out, end, err)
	return nil
}

func (c *call) sessionAttach() error {
	var p sessionName
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err != nil {
		return err
	}
	r, held, err := store.CheckAttach(p.Name)
	if err != nil {
		return err
	}
	if err := c.stream(); err != nil {
		held.Close()
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	if err := store.Attach(r, held, wire.NewFrameReader(c.in), out); err != nil {
		c.finish(out, nil, err)
	}
	return nil
}

func (c *call) sessionSend() error {
	var p struct {
		sessionName
		End bool `json:"end"`
	}
	store, err := c.sessions()
	if err == nil {
		err = c.params(&p)
	}
	if err == nil {
		err = store.CheckInput(p.Name)
	}
	if err != nil {
		return err
	}
	if err := c.stream(); err != nil {
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	sent, err := store.Send(p.Name, p.End, wire.NewFrameReader(c.in), out)
	c.finish(out, map[string]any{"bytes": sent}, err)
	return nil
}
