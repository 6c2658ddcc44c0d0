package service

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/tree"
	"banger/agent/internal/wire"
)

// drainWait bounds the discarding of a tar whose unpacking failed.
const drainWait = 60 * time.Second

func (c *call) exec() error {
	var p command.Params
	if err := c.params(&p); err != nil {
		return err
	}
	return c.run(p)
}

// run runs a command on this connection.
func (c *call) run(p command.Params) error {
	plan, err := command.BuildPlan(p, c.Host)
	if err != nil {
		return err
	}
	if err := c.stream(); err != nil {
		c.Log("%s: answering: %v", c.req.Method, err)
		return nil
	}
	in, out := wire.NewFrameReader(c.in), wire.NewFrameWriter(c.conn)
	err = command.Run(c.Reaper, plan, in, out, c.Started)
	if err != nil {
		c.Log("%s: %v", c.req.Method, err)
	}
	return nil
}

func (c *call) put() error {
	var p struct {
		Path   string      `json:"path"`
		Mode   tree.Mode   `json:"mode"`
		Owner  *tree.Owner `json:"owner"`
		Report bool        `json:"report"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	switch p.Mode {
	case tree.Replace, tree.New, tree.Merge, tree.Update:
	default:
		return wire.Errorf(wire.BadRequest, "put: mode %q is none of replace, new, merge, update", p.Mode)
	}
	if err := c.stream(); err != nil {
		c.Log("put: answering: %v", err)
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	data := wire.NewDataReader(wire.NewFrameReader(c.in))
	o := tree.Options{Mode: p.Mode, Owner: p.Owner}
	if p.Report {
		o.Report = wire.NewDataWriter(out)
	}
	counts, err := tree.PutWith(p.Path, data, o)
	c.finish(out, counts, err)
	if err != nil {
		// The client may be sending still, and reads the error only afterwards.
		_ = c.conn.SetReadDeadline(time.Now().Add(drainWait))
		_ = data.Drain()
	}
	return nil
}

func (c *call) get() error {
	var p struct {
		Path  string `json:"path"`
		Names bool   `json:"names"`
		// Except: the names are those of files that shall not come.
		Except bool `json:"except"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	return c.send("get", func(w io.Writer) (tree.Counts, error) {
		if !p.Names && !p.Except {
			return tree.Get(p.Path, w)
		}
		names, err := readNames(wire.NewDataReader(wire.NewFrameReader(c.in)))
		if err != nil {
			return tree.Counts{}, err
		}
		if p.Except {
			return tree.GetExcept(p.Path, names, w)
		}
		return tree.GetNames(p.Path, names, w)
	})
}

// maxNames bounds the memory for a list of names, in bytes.
const maxNames = 256 << 20

// readNames reads names that are each ended by NUL.
func readNames(r io.Reader) ([]string, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxNames+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxNames || len(text) > 0 && text[len(text)-1] != 0 {
		return nil, wire.Errorf(wire.BadRequest, "get: the list of names is too long or cut")
	}
	if len(text) == 0 {
		return nil, nil
	}
	return strings.Split(string(text[:len(text)-1]), "\x00"), nil
}

func (c *call) scan() error {
	var p struct {
		Path string `json:"path"`
		Git  bool   `json:"git"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	return c.send("scan", func(w io.Writer) (tree.Counts, error) {
		return tree.Scan(p.Path, p.Git, w)
	})
}

// send answers with a stream of data and its result.
func (c *call) send(method string, write func(io.Writer) (tree.Counts, error)) error {
	if err := c.stream(); err != nil {
		c.Log("%s: answering: %v", method, err)
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	data := wire.NewDataWriter(out)
	counts, err := write(data)
	if err == nil {
		err = data.Close()
	}
	c.finish(out, counts, err)
	return nil
}

// stat tells what a path leads to, links followed.
func (c *call) stat() (any, error) {
	var p struct {
		Path string `json:"path"`
	}
	if err := c.params(&p); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(p.Path) {
		return nil, wire.Errorf(wire.BadRequest, "stat: path %q is not absolute", p.Path)
	}
	real, err := filepath.EvalSymlinks(p.Path)
	var info os.FileInfo
	if err == nil {
		info, err = os.Stat(real)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, wire.Errorf(wire.NotFound, "stat: %s does not exist", p.Path)
	}
	if err != nil {
		return nil, err
	}
	kind := "other"
	switch {
	case info.IsDir():
		kind = "directory"
	case info.Mode().IsRegular():
		kind = "file"
	}
	return map[string]any{"kind": kind, "path": real, "size": info.Size(),
		"mode": uint32(info.Mode().Perm())}, nil
}

// finish ends a stream with its result or error.
func (c *call) finish(out *wire.FrameWriter, result any, err error) {
	if err == nil {
		err = out.WriteJSON(wire.Result, result)
	} else {
		e := *wire.AsError(err)
		e.OpID = c.req.OpID
		err = out.WriteJSON(wire.Failure, &e)
	}
	if err != nil {
		c.Log("%s: answering: %v", c.req.Method, err)
	}
}

// dial joins the connection with a TCP port of the guest's loopback.
func (c *call) dial() error {
	var p struct {
		Port int `json:"port"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	if p.Port < 1 || p.Port > 65535 {
		return wire.Errorf(wire.BadRequest, "dial: port %d is not between 1 and 65535", p.Port)
	}
	d := net.Dialer{Timeout: 10 * time.Second}
	local, err := d.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.Port)))
	if err != nil {
		return wire.Errorf(wire.OperationFailed, "dial: %v", err)
	}
	defer local.Close()
	if err := c.stream(); err != nil {
		c.Log("dial: answering: %v", err)
		return nil
	}
	join(c.conn, c.in, local.(Conn))
	return nil
}

// wholeEnder is a connection whose other side never hears of a half-close.
type wholeEnder interface{ endsWhole() }

// join copies both ways until both directions have ended. The end of one is passed on as a
// half-close; a failure ends both, since the bytes it lost cannot be made up for. So does the local
// end where the client would otherwise wait for it for ever.
func join(client Conn, clientIn io.Reader, local Conn) {
	var both sync.WaitGroup
	carry := func(to Conn, from io.Reader) {
		if _, err := io.Copy(to, from); err != nil {
			client.Close()
			local.Close()
			return
		}
		if _, whole := to.(wholeEnder); whole {
			to.Close()
			return
		}
		_ = to.CloseWrite()
	}
	both.Go(func() { carry(local, clientIn) })
	both.Go(func() { carry(client, local) })
	both.Wait()
}
