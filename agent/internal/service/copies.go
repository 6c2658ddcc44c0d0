package service

import (
	"bytes"
	"encoding/binary"
	"io"
	"time"

	"banger/agent/internal/tree"
	"banger/agent/internal/wire"
)

// What a copy that can be interrupted is made of: which files are there, one file out from an
// offset, one file in from where it stopped.

func (c *call) digest() error {
	var p struct {
		Path string `json:"path"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	return c.send("digest", func(w io.Writer) (tree.Counts, error) {
		wanted, err := readWanted(wire.NewDataReader(wire.NewFrameReader(c.in)))
		if err != nil {
			return tree.Counts{}, err
		}
		return tree.Digests(p.Path, wanted, w)
	})
}

// readWanted reads entries of size (u64), length of the name (u16) and name, little endian.
func readWanted(r io.Reader) ([]tree.Wanted, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxNames+1))
	if err != nil {
		return nil, err
	}
	bad := wire.Errorf(wire.BadRequest, "digest: the list of files is too long or cut")
	if len(text) > maxNames {
		return nil, bad
	}
	var wanted []tree.Wanted
	for rest := bytes.NewBuffer(text); rest.Len() > 0; {
		head := rest.Next(10)
		if len(head) < 10 {
			return nil, bad
		}
		size, length := binary.LittleEndian.Uint64(head), int(binary.LittleEndian.Uint16(head[8:]))
		if rest.Len() < length {
			return nil, bad
		}
		wanted = append(wanted, tree.Wanted{Name: string(rest.Next(length)), Size: size})
	}
	return wanted, nil
}

func (c *call) read() error {
	var p struct {
		Path   string `json:"path"`
		Name   []byte `json:"name"`
		Offset int64  `json:"offset"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	return c.send("read", func(w io.Writer) (tree.Counts, error) {
		return tree.ReadFile(p.Path, string(p.Name), p.Offset, w)
	})
}

func (c *call) putFile() error {
	var p tree.File
	if err := c.params(&p); err != nil {
		return err
	}
	if err := c.stream(); err != nil {
		c.Log("put_file: answering: %v", err)
		return nil
	}
	out := wire.NewFrameWriter(c.conn)
	data := wire.NewDataReader(wire.NewFrameReader(c.in))
	counts, err := tree.PutFile(p, data, wire.NewDataWriter(out))
	c.finish(out, counts, err)
	if err != nil {
		// As for put: the client reads the error when it has sent what it has to send.
		_ = c.conn.SetReadDeadline(time.Now().Add(drainWait))
		_ = data.Drain()
	}
	return nil
}

func (c *call) place() (any, error) {
	var p struct {
		Path string `json:"path"`
	}
	if err := c.params(&p); err != nil {
		return nil, err
	}
	return none{}, tree.PlaceTree(p.Path)
}
