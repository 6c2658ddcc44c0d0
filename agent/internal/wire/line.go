// Package wire is banger's protocol: one JSON line each way, then length-prefixed frames.
//
// It owns no connection. Everything read here comes from outside, so every length is checked
// against its limit before memory is taken for it. docs/protocol.md is the contract.
package wire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Version of the protocol.
const Version = 1

// MaxLine is the longest request or reply line in bytes, its newline included.
const MaxLine = 1 << 20

// Error codes, a closed set.
const (
	BadVersion      = "bad_version"
	BadRequest      = "bad_request"
	UnknownMethod   = "unknown_method"
	Unauthorized    = "unauthorized"
	NotFound        = "not_found"
	AlreadyExists   = "already_exists"
	NotRunning      = "not_running"
	OperationFailed = "operation_failed"
)

// Error is an error as it travels: what was being done to which thing and why it failed.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	OpID    string `json:"op_id,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Errorf builds an Error with one of the codes above.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// AsError converts any error: an *Error stays as it is, everything else is operation_failed.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: OperationFailed, Message: err.Error()}
}

// Request is the envelope of a call. Unknown envelope fields are ignored.
type Request struct {
	Version int             `json:"version"`
	Method  string          `json:"method"`
	Params  json.RawMessage `json:"params,omitempty"`
	OpID    string          `json:"op_id,omitempty"`
	Token   string          `json:"token,omitempty"`
}

// Reply is the line that answers a request.
type Reply struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
	Stream bool            `json:"stream,omitempty"`
	OpID   string          `json:"op_id,omitempty"`
}

// ReadLine reads one line of at most MaxLine bytes and returns it without its newline.
//
// Errors: io.EOF when nothing came, io.ErrUnexpectedEOF when the line has no end, a bad_request
// *Error when it is too long.
func ReadLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > MaxLine {
			return nil, Errorf(BadRequest, "reading a line: longer than %d bytes", MaxLine)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// ParseRequest decodes a request line. The version is checked here, the token is not.
func ParseRequest(line []byte) (Request, error) {
	var req Request
	if err := json.Unmarshal(line, &req); err != nil {
		return Request{}, Errorf(BadRequest, "reading the request line: %v", err)
	}
	if req.Version != Version {
		e := Errorf(BadVersion, "the agent speaks protocol %d, the request protocol %d",
			Version, req.Version)
		e.Hint = "banger vm restart"
		return req, e
	}
	if req.Method == "" {
		return req, Errorf(BadRequest, "reading the request line: method is missing")
	}
	return req, nil
}

// DecodeParams decodes params into v. Absent and null params are an empty object.
//
// Errors: bad_request for a wrong type or an unknown field, which is named.
func DecodeParams(method string, params json.RawMessage, v any) error {
	if len(params) == 0 || bytes.Equal(params, []byte("null")) {
		params = []byte("{}")
	}
	d := json.NewDecoder(bytes.NewReader(params))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return Errorf(BadRequest, "reading the params of %s: %v", method, err)
	}
	return nil
}

// WriteJSONLine writes v as one JSON line in a single write.
func WriteJSONLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding a line: %w", err)
	}
	if len(line)+1 > MaxLine {
		return fmt.Errorf("encoding a line: %d bytes, the limit is %d", len(line)+1, MaxLine)
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
