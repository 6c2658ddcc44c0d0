package service

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type activityResult struct {
	Streams  int `json:"streams"`
	Sessions int `json:"sessions"`
	SSH      int `json:"ssh"`
}

func (f *fixture) activity(t *testing.T) activityResult {
	t.Helper()
	reply := f.connect(t).send(`{"version":1,"method":"activity"}`).reply()
	if reply.Error != nil {
		t.Fatal(reply.Error)
	}
	var got activityResult
	if err := json.Unmarshal(reply.Result, &got); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestAnOpenCommandIsActivityUntilItEnds(t *testing.T) {
	f := serve(t, "")
	if got := f.activity(t); got.Streams != 0 || got.Sessions != 0 {
		t.Fatalf("an idle machine says %+v", got)
	}
	p := f.connect(t).send(`{"version":1,"method":"exec","params":{"argv":["/bin/cat"]}}`)
	if !p.reply().Stream {
		t.Fatal("the command did not start")
	}
	if got := f.activity(t); got.Streams != 1 {
		t.Fatalf("with a command open: %+v", got)
	}
	p.conn.Close()
	deadline := time.Now().Add(2 * time.Minute)
	for got := f.activity(t); got.Streams != 0; got = f.activity(t) {
		if time.Now().After(deadline) {
			t.Fatalf("after its end: %+v", got)
		}
	}
}

func TestConnectionsAreCountedByStateAndLocalPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	count := func() int {
		t.Helper()
		n, err := countConnections("/proc/net/tcp", port)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := count(); n != 0 {
		t.Fatalf("a listener alone counts %d", n)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	// The client's own end has the port as its remote one.
	if n := count(); n != 1 {
		t.Fatalf("one connection counts %d", n)
	}
}

func TestAMalformedTableIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tcp")
	if err := os.WriteFile(path, []byte("header\n 0: nonsense 0:0 01 x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := countConnections(path, 22); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Fatalf("got %v", err)
	}
}
