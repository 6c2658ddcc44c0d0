package wire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
)

func reader(data []byte) *bufio.Reader { return bufio.NewReader(bytes.NewReader(data)) }

func TestFramesComeBackAsTheyWereWritten(t *testing.T) {
	var wire bytes.Buffer
	w := NewFrameWriter(&wire)
	payloads := [][]byte{nil, []byte("x"), bytes.Repeat([]byte{0xff}, MaxPayload)}
	for i, p := range payloads {
		if err := w.Write(byte(i+1), p); err != nil {
			t.Fatal(err)
		}
	}
	r := NewFrameReader(reader(wire.Bytes()))
	for i, p := range payloads {
		kind, got, err := r.Read()
		if err != nil || kind != byte(i+1) || !bytes.Equal(got, p) {
			t.Fatalf("frame %d: type %d, %d bytes, %v", i, kind, len(got), err)
		}
	}
	if _, _, err := r.Read(); err != io.EOF {
		t.Fatalf("after the last frame: %v", err)
	}
}

func TestFrameAboveTheLimitIsRefusedBeforeItsPayload(t *testing.T) {
	r := NewFrameReader(reader([]byte{Stdin, 0xff, 0xff, 0xff, 0xff}))
	_, _, err := r.Read()
	var e *Error
	if !errors.As(err, &e) || e.Code != BadRequest {
		t.Fatalf("got %v", err)
	}
	if cap(r.buf) != 0 {
		t.Fatalf("%d bytes were taken for it", cap(r.buf))
	}
	if err := NewFrameWriter(io.Discard).Write(Data, make([]byte, MaxPayload+1)); err == nil {
		t.Fatal("the writer sent one")
	}
}

func TestCutFrameIsNoCleanEnd(t *testing.T) {
	for _, data := range [][]byte{{Stdin, 0}, {Stdin, 0, 0, 0, 3}, {Stdin, 0, 0, 0, 3, 'a'}} {
		if _, _, err := NewFrameReader(reader(data)).Read(); err != io.ErrUnexpectedEOF {
			t.Errorf("%v: %v", data, err)
		}
	}
}

func TestDataEndsOnlyWithItsEndFrame(t *testing.T) {
	var wire bytes.Buffer
	d := NewDataWriter(NewFrameWriter(&wire))
	long := bytes.Repeat([]byte("0123456789"), 60000)
	if _, err := d.Write(long); err != nil {
		t.Fatal(err)
	}
	_, err := io.ReadAll(NewDataReader(NewFrameReader(reader(wire.Bytes()))))
	var e *Error
	if !errors.As(err, &e) || e.Reason != "connection_lost" {
		t.Fatalf("without data_end: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(NewDataReader(NewFrameReader(reader(wire.Bytes()))))
	if err != nil || !bytes.Equal(got, long) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestLineLongerThanTheLimitIsRefused(t *testing.T) {
	line, err := ReadLine(reader([]byte("{}\nrest")))
	if err != nil || string(line) != "{}" {
		t.Fatalf("%q, %v", line, err)
	}
	long := bytes.Repeat([]byte("a"), MaxLine)
	if _, err := ReadLine(reader(append(long, '\n'))); AsError(err).Code != BadRequest {
		t.Fatalf("one byte too long: %v", err)
	}
	if line, err := ReadLine(reader(append(long[1:], '\n'))); err != nil || len(line) != MaxLine-1 {
		t.Fatalf("just right: %d bytes, %v", len(line), err)
	}
	if _, err := ReadLine(reader([]byte("{"))); err != io.ErrUnexpectedEOF {
		t.Fatalf("cut: %v", err)
	}
}

func TestRequestsAreCheckedForVersionAndMethod(t *testing.T) {
	for line, code := range map[string]string{
		`{"version":1,"method":"hello","future":1}`: "",
		`{"version":2,"method":"hello"}`:            BadVersion,
		`{"method":"hello"}`:                        BadVersion,
		`{"version":1}`:                             BadRequest,
		`{"version":"1","method":"hello"}`:          BadRequest,
		`[]`:                                        BadRequest,
		``:                                          BadRequest,
	} {
		_, err := ParseRequest([]byte(line))
		if code == "" && err != nil || code != "" && (err == nil || AsError(err).Code != code) {
			t.Errorf("%s: %v", line, err)
		}
	}
}

func TestUnknownParamsAreNamed(t *testing.T) {
	var p struct {
		Path string `json:"path"`
	}
	for _, empty := range []json.RawMessage{nil, []byte("null"), []byte("{}")} {
		if err := DecodeParams("get", empty, &p); err != nil {
			t.Errorf("%s: %v", empty, err)
		}
	}
	err := DecodeParams("get", []byte(`{"path":"/a","pathh":1}`), &p)
	if err == nil || AsError(err).Code != BadRequest || !strings.Contains(err.Error(), "pathh") {
		t.Fatalf("%v", err)
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{Stdin, 0, 0, 0, 1, 'a', DataEnd, 0, 0, 0, 0})
	f.Add([]byte{Data, 0xff, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		var again bytes.Buffer
		r, w := NewFrameReader(reader(data)), NewFrameWriter(&again)
		for {
			kind, payload, err := r.Read()
			if err != nil {
				break
			}
			if err := w.Write(kind, payload); err != nil {
				t.Fatal(err)
			}
		}
		if cap(r.buf) > MaxPayload {
			t.Fatalf("a buffer of %d bytes", cap(r.buf))
		}
		if !bytes.HasPrefix(data, again.Bytes()) {
			t.Fatal("what was read is not what came")
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"method":"exec","params":{"argv":["true"]},"op_id":"op-1","token":"t"}`))
	f.Add([]byte("{\"version\":1,\"method\":\"\\ud800\"}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		line, err := ReadLine(reader(append(data, '\n')))
		if err != nil {
			return
		}
		req, err := ParseRequest(line)
		if err != nil {
			if AsError(err).Message == "" {
				t.Fatal("an error without a message")
			}
			return
		}
		var p map[string]any
		_ = DecodeParams(req.Method, req.Params, &p)
		if req.Version != Version || req.Method == "" {
			t.Fatalf("accepted %q", line)
		}
	})
}
