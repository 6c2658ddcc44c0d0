package command

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger/agent/internal/guest"
	"banger/agent/internal/wire"
)

// image makes a root directory with accounts and shells.
func image(t *testing.T, shells ...string) Host {
	t.Helper()
	root := t.TempDir()
	files := map[string]string{
		"etc/passwd": "root:x:0:0::/:/bin/bash\ndev:x:1000:1000::/home/dev:/bin/fish\n" +
			"www:x:33:33::/nonexistent:/usr/sbin/nologin\n",
		"etc/group": "video:x:44:dev\n",
	}
	for _, shell := range shells {
		files[shell[1:]] = ""
	}
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return Host{Root: root, VMName: "web"}
}

func build(t *testing.T, p Params, h Host) Plan {
	t.Helper()
	plan, err := BuildPlan(p, h)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

func TestLoginRunsTheArgumentsAsAListThroughTheShell(t *testing.T) {
	h := image(t, "/bin/bash", "/bin/sh")
	plan := build(t, Params{Argv: []string{"echo", "a b", "$x"}, Login: true}, h)
	want := []string{"/bin/bash", "-l", "-c", `exec "$@"`, "/bin/bash", "echo", "a b", "$x"}
	if plan.Program != "/bin/bash" || !slices.Equal(plan.Argv, want) {
		t.Fatalf("%q %q", plan.Program, plan.Argv)
	}
}

func TestShellsThatSpeakAnotherLanguageAreNotGivenOurLine(t *testing.T) {
	h := image(t, "/bin/fish", "/bin/sh")
	plan := build(t, Params{Argv: []string{"true"}, Login: true, User: "dev"}, h)
	if plan.Program != "/bin/sh" {
		t.Fatal(plan.Program)
	}
	if plan = build(t, Params{User: "dev"}, h); plan.Program != "/bin/fish" {
		t.Fatalf("as an interactive shell: %s", plan.Program)
	}
}

func TestServiceAccountsGetAShellThatRuns(t *testing.T) {
	h := image(t, "/usr/sbin/nologin", "/bin/sh")
	plan := build(t, Params{Argv: []string{"true"}, Login: true, User: "www"}, h)
	if plan.Program != "/bin/sh" || plan.Dir != "/" || plan.Cred.Uid != 33 {
		t.Fatalf("%+v", plan)
	}
}

func TestImagesWithoutAShellRunCommandsDirectly(t *testing.T) {
	h := image(t)
	plan := build(t, Params{Argv: []string{"/bin/true"}, Login: true}, h)
	if plan.Program != "/bin/true" {
		t.Fatalf("%+v", plan)
	}
	_, err := BuildPlan(Params{}, h)
	if e := wire.AsError(err); err == nil || e.Code != wire.NotFound || e.Hint != "banger vm exec" {
		t.Fatalf("an interactive shell: %v", err)
	}
}

func TestImageEnvironmentIsNotOverwrittenByALoginShell(t *testing.T) {
	h := image(t, "/bin/bash")
	h.Image = &guest.ImageConfig{Env: []string{"PATH=/opt/x/bin:/bin", "A=image", "B=image"}, User: "dev:44"}
	plan := build(t, Params{Argv: []string{"/bin/true"}, Login: true,
		Env: map[string]string{"B": "caller"}}, h)
	if plan.Program != "/bin/true" {
		t.Fatalf("through %s", plan.Program)
	}
	for _, want := range []string{"PATH=/opt/x/bin:/bin", "A=image", "B=caller", "HOME=/home/dev",
		"USER=dev", "LOGNAME=dev", "BANGER_VM=web", "SHELL=/bin/bash"} {
		if !slices.Contains(plan.Env, want) {
			t.Errorf("%s is missing in %q", want, plan.Env)
		}
	}
	if plan.Cred.Uid != 1000 || plan.Cred.Gid != 44 {
		t.Errorf("%+v", plan.Cred)
	}
	if plan = build(t, Params{}, h); !slices.Equal(plan.Argv, []string{"/bin/bash"}) {
		t.Errorf("an interactive shell: %q", plan.Argv)
	}
}

func TestWorkingDirectoryIsAskedForOrTheImagesOrHome(t *testing.T) {
	h := image(t, "/bin/sh")
	dir := t.TempDir()
	if plan := build(t, Params{Argv: []string{"true"}, Cwd: dir}, h); plan.Dir != dir {
		t.Error(plan.Dir)
	}
	_, err := BuildPlan(Params{Argv: []string{"true"}, Cwd: dir + "/none"}, h)
	if err == nil || wire.AsError(err).Code != wire.NotFound {
		t.Errorf("a missing one: %v", err)
	}
	h.Image = &guest.ImageConfig{Workdir: dir + "/made"}
	if plan := build(t, Params{Argv: []string{"true"}}, h); plan.Dir != dir+"/made" || !isDir(plan.Dir) {
		t.Errorf("the image's: %s", plan.Dir)
	}
}

func TestRequestsThatCannotRunAreRefusedBeforeAnythingRuns(t *testing.T) {
	h := image(t, "/bin/sh")
	many := make([]string, 60000)
	for i := range many {
		many[i] = strings.Repeat("y", 200)
	}
	for name, p := range map[string]Params{
		"a NUL byte":        {Argv: []string{"true", "a\x00b"}},
		"an empty program":  {Argv: []string{""}},
		"a bad variable":    {Argv: []string{"true"}, Env: map[string]string{"A=B": "x"}},
		"a relative cwd":    {Argv: []string{"true"}, Cwd: "tmp"},
		"one long argument": {Argv: []string{"true", strings.Repeat("x", 128<<10)}},
		"too much in all":   {Argv: many},
	} {
		if _, err := BuildPlan(p, h); err == nil || wire.AsError(err).Code != wire.BadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := BuildPlan(Params{Argv: []string{"true"}, User: "nobody-here"}, h); err == nil ||
		wire.AsError(err).Code != wire.NotFound {
		t.Errorf("an unknown user: %v", err)
	}
}

func TestProgramsAreFoundInThePathOfTheCommand(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tool"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	h := image(t, "/bin/sh")
	plan := build(t, Params{Argv: []string{"tool"}, Env: map[string]string{"PATH": "/none:" + dir}}, h)
	if plan.Program != filepath.Join(dir, "tool") || plan.Argv[0] != "tool" {
		t.Fatalf("%+v", plan)
	}
}
