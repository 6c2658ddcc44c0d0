package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// build compiles the program as releases do.
func build(t *testing.T, arch string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=9.8.7", "-o", out, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s", text)
	}
	return out
}

func TestBothArchitecturesBuildStaticAndTheSameTwice(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		first, err := os.ReadFile(build(t, arch))
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(build(t, arch))
		if err != nil {
			t.Fatal(err)
		}
		if string(first) != string(second) {
			t.Errorf("%s: two builds differ", arch)
		}
		if strings.Contains(string(first), "/lib64/ld-linux") || strings.Contains(string(first), "/lib/ld-linux") {
			t.Errorf("%s: it needs a dynamic loader", arch)
		}
	}
}

func TestTheProgramServesOnAHostUntilItIsAskedToStop(t *testing.T) {
	program := build(t, "")
	out, err := exec.Command(program, "--version").Output()
	if err != nil || string(out) != "banger-vsock-agent 9.8.7 (protocol 1)\n" {
		t.Fatalf("%q, %v", out, err)
	}
	dir := t.TempDir()
	host, err := net.Listen("unix", dir+"/host")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	config := `{"schema":1,"vm_id":"` + strings.Repeat("a", 32) + `","name":"web","hostname":"web"}`
	if err := os.WriteFile(dir+"/config", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "serve", "--listen", "unix:"+dir+"/agent",
		"--config", dir+"/config", "--announce", "unix:"+dir+"/host")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	c, err := host.Accept()
	if err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(c).ReadString('\n')
	if !strings.Contains(line, `"agent_version":"9.8.7"`) || !strings.Contains(line, strings.Repeat("a", 32)) {
		t.Errorf("%s", line)
	}
	fmt.Fprintln(c, `{"result":{"time_unix_ns":0}}`)
	c.Close()
	// The first thing announced can serve.
	agent, err := net.Dial("unix", dir+"/agent")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(agent, `{"version":1,"method":"shutdown","params":{"grace_s":1}}`)
	if line, _ := bufio.NewReader(agent).ReadString('\n'); line != "{\"result\":{}}\n" {
		t.Errorf("%s", line)
	}
	agent.Close()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(2 * time.Minute):
		t.Error("it still runs")
	}
}

func TestWrongUsageIsStatus2AndTCPNeedsAToken(t *testing.T) {
	program := build(t, "")
	err := exec.Command(program, "nonsense").Run()
	if e, ok := err.(*exec.ExitError); !ok || e.ExitCode() != 2 {
		t.Errorf("%v", err)
	}
	out, err := exec.Command(program, "serve", "--listen", "tcp:127.0.0.1:0").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "token") {
		t.Errorf("%s, %v", out, err)
	}
}
