package boot

import (
	"os"
	"path/filepath"
	"testing"

	"banger/agent/internal/guest"
)

func TestOpenrcCountsAsRunningAfterItsBootRunlevels(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if openrcDone(dir) {
		t.Error("before it has started")
	}
	write("rc.starting", "")
	for level, want := range map[string]bool{"sysinit\n": false, "boot": false, "default": false} {
		if write("softlevel", level); openrcDone(dir) != want {
			t.Errorf("while starting %q", level)
		}
	}
	if err := os.Remove(filepath.Join(dir, "rc.starting")); err != nil {
		t.Fatal(err)
	}
	for level, want := range map[string]bool{"boot\n": false, "default\n": true} {
		if write("softlevel", level); openrcDone(dir) != want {
			t.Errorf("in %q", level)
		}
	}
}

func TestTransportsGiveTheirAddresses(t *testing.T) {
	listen, announce, _, err := addresses(&guest.Config{Transport: guest.Transport{
		Kind: "vsock", ListenPort: 7000, AnnouncePort: 7001}})
	if err != nil || listen.Port != 7000 || announce.Port != 7001 || announce.Kind != "vsock" {
		t.Errorf("%+v %+v %v", listen, announce, err)
	}
	listen, announce, peer, err := addresses(&guest.Config{Transport: guest.Transport{
		Kind: "tcp", ListenPort: 7000, Announce: "172.16.0.1:7001", Peer: "172.16.0.1"}})
	if err != nil || listen.Host != "0.0.0.0:7000" || announce.Host != "172.16.0.1:7001" ||
		peer.String() != "172.16.0.1" {
		t.Errorf("%+v %+v %v %v", listen, announce, peer, err)
	}
	if _, _, _, err := addresses(&guest.Config{Transport: guest.Transport{
		Kind: "tcp", Announce: "nonsense", Peer: "172.16.0.1"}}); err == nil {
		t.Error("an announcement to nowhere")
	}
}
