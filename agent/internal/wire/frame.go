package wire

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// Frame types.
const (
	Event      byte = 0x01
	Stdout     byte = 0x02
	Stderr     byte = 0x03
	Stdin      byte = 0x04
	StdinClose byte = 0x05
	Credit     byte = 0x06
	Resize     byte = 0x07
	Signal     byte = 0x08
	Data       byte = 0x09
	DataEnd    byte = 0x0a
	Exit       byte = 0x0e
	Result     byte = 0x0f
	Failure    byte = 0x10
)

// MaxPayload is the largest frame payload, StartCredit the stdin bytes a client may send before
// the first credit frame.
const (
	MaxPayload  = 256 << 10
	StartCredit = 256 << 10

	headerSize = 5
)

// FrameReader reads frames; its buffer is reused, so a payload is valid until the next Read.
type FrameReader struct {
	r   *bufio.Reader
	buf []byte
}

// NewFrameReader reads from r, which may hold bytes that came together with the request line.
func NewFrameReader(r *bufio.Reader) *FrameReader { return &FrameReader{r: r} }

// Read returns the next frame.
//
// Errors: io.EOF at the end of the stream between two frames, io.ErrUnexpectedEOF inside one, a
// bad_request *Error when the announced length is above MaxPayload.
func (f *FrameReader) Read() (kind byte, payload []byte, err error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(f.r, header[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(header[1:])
	if size > MaxPayload {
		return 0, nil, Errorf(BadRequest, "reading a frame of type 0x%02x: %d bytes, the limit is %d",
			header[0], size, MaxPayload)
	}
	if cap(f.buf) < int(size) {
		f.buf = make([]byte, size)
	}
	payload = f.buf[:size]
	if _, err := io.ReadFull(f.r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return header[0], payload, nil
}

// FrameWriter writes whole frames from several goroutines. A slow peer blocks the writer, which is
// how back-pressure reaches the process whose output is being sent.
type FrameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
	err error
}

// NewFrameWriter writes to w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Write sends one frame of at most MaxPayload bytes. After the first failure every call returns
// that failure: half a frame may be on the wire.
func (f *FrameWriter) Write(kind byte, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("writing a frame of type 0x%02x: %d bytes, the limit is %d",
			kind, len(payload), MaxPayload)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	// One buffer and one write: two writes would be two packets.
	f.buf = append(f.buf[:0], kind, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(f.buf[1:], uint32(len(payload)))
	f.buf = append(f.buf, payload...)
	_, f.err = f.w.Write(f.buf)
	return f.err
}

// WriteJSON sends v as the payload of one frame.
func (f *FrameWriter) WriteJSON(kind byte, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding a frame of type 0x%02x: %w", kind, err)
	}
	return f.Write(kind, payload)
}

// WriteCredit lets the peer send n more bytes of stdin.
func (f *FrameWriter) WriteCredit(n int) error {
	return f.Write(Credit, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

// DataReader turns data frames into a byte stream that ends cleanly at data_end only.
type DataReader struct {
	frames *FrameReader
	rest   []byte
	end    bool
	err    error
}

// NewDataReader reads the data frames of frames.
func NewDataReader(frames *FrameReader) *DataReader { return &DataReader{frames: frames} }

// Read implements io.Reader. A connection that ends before data_end is connection_lost.
func (d *DataReader) Read(p []byte) (int, error) {
	for len(d.rest) == 0 {
		if d.end {
			return 0, io.EOF
		}
		if d.err != nil {
			return 0, d.err
		}
		kind, payload, err := d.frames.Read()
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			d.err = &Error{Code: OperationFailed, Reason: "connection_lost",
				Message: "receiving data: the connection ended before the data did"}
		case err != nil:
			d.err = err
		case kind == Data:
			d.rest = payload
		case kind == DataEnd:
			d.end = true
		default:
			d.err = Errorf(BadRequest, "receiving data: unexpected frame of type 0x%02x", kind)
		}
	}
	n := copy(p, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// Drain discards what is left up to data_end or the end of the connection.
func (d *DataReader) Drain() error {
	d.rest = nil
	_, err := io.Copy(io.Discard, d)
	return err
}

// DataWriter sends a byte stream as data frames. Close sends data_end.
type DataWriter struct{ frames *FrameWriter }

// NewDataWriter sends on frames.
func NewDataWriter(frames *FrameWriter) DataWriter { return DataWriter{frames} }

// Write implements io.Writer.
func (d DataWriter) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, MaxPayload)
		if err := d.frames.Write(Data, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// Close ends the data, not the connection.
func (d DataWriter) Close() error { return d.frames.Write(DataEnd, nil) }
