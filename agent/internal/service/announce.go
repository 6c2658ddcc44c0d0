package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"banger/agent/internal/wire"
)

const (
	announceTimeout = 10 * time.Second
	// Between two tries: the host listens before it starts the VM, so the first mostly succeeds.
	firstPause, longestPause = 50 * time.Millisecond, 2 * time.Second
)

// Announce tells the host that commands can run. A failed try is repeated until one succeeds or
// ctx ends; each kind of failure is logged once.
func (s *Server) Announce(ctx context.Context, to Address) error {
	pause, last := firstPause, ""
	for {
		err := s.announceOnce(to)
		if err == nil {
			return nil
		}
		if cause := rootCause(err); cause != last {
			last = cause
			s.Log("announcing to the host: %v; trying on", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// rootCause is the text of the innermost error: outer ones name ports that change with each try.
func rootCause(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}

func (s *Server) announceOnce(to Address) error {
	conn, err := Dial(to, announceTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(announceTimeout))
	params, err := json.Marshal(s.identity())
	if err != nil {
		return err
	}
	request := wire.Request{Version: wire.Version, Method: "announce", Params: params,
		Token: s.Config.Token}
	if err := wire.WriteJSONLine(conn, request); err != nil {
		return err
	}
	line, err := wire.ReadLine(bufio.NewReader(conn))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	var reply wire.Reply
	if err := json.Unmarshal(line, &reply); err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if reply.Error != nil {
		return reply.Error
	}
	var result struct {
		TimeUnixNs int64 `json:"time_unix_ns"`
	}
	if err := json.Unmarshal(reply.Result, &result); err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if result.TimeUnixNs > 0 {
		// Not a reason to stay silent: the VM works, its clock is off, and the log says so.
		if _, err := s.Machine.StepClock(result.TimeUnixNs); err != nil {
			s.Log("setting the clock: %v", err)
		}
	}
	return wire.WriteJSONLine(conn, map[string]bool{"ready": true})
}
