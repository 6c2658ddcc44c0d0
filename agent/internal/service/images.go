package service

import (
	"io"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/packages"
	"banger/agent/internal/tree"
	"banger/agent/internal/wire"
)

// What a build of an image from this machine asks for: its packages, and the whole of it.

// packages tells which distribution and which package manager this is.
func (c *call) packages() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	release := packages.ReadRelease(c.Host.Root)
	like := release.Like
	if like == nil {
		like = []string{}
	}
	return map[string]any{"id": release.ID, "like": like, "manager": release.Find()}, nil
}

// install installs packages with the guest's own manager; its frames are those of exec.
func (c *call) install() error {
	var p struct {
		Packages []string `json:"packages"`
	}
	if err := c.params(&p); err != nil {
		return err
	}
	release := packages.ReadRelease(c.Host.Root)
	manager := release.Find()
	if manager == "" {
		return wire.Errorf(wire.NotFound,
			"installing packages: no package manager is known for ID=%q of its os-release", release.ID)
	}
	argv, env, err := manager.Install(p.Packages)
	if err != nil {
		return wire.Errorf(wire.BadRequest, "install: %v", err)
	}
	return c.run(command.Params{Argv: argv, Env: env, Cwd: "/", User: "root"})
}

// capture stops what writes, then sends the whole system as one tar.
func (c *call) capture() error {
	p := struct {
		Path    string   `json:"path"`
		Exclude []string `json:"exclude"`
		Enter   []string `json:"enter"`
		GraceS  float64  `json:"grace_s"`
	}{Path: "/", GraceS: 10}
	if err := c.params(&p); err != nil {
		return err
	}
	if err := checkGrace("capture", p.GraceS); err != nil {
		return err
	}
	return c.send("capture", func(w io.Writer) (tree.Counts, error) {
		c.Machine.Settle(time.Duration(p.GraceS * float64(time.Second)))
		return tree.Whole(p.Path, tree.Selection{Exclude: p.Exclude, Enter: p.Enter}, w)
	})
}
