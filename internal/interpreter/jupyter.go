package interpreter

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// The messages of Jupyter's kernels, version 5.3 of
// https://jupyter-client.readthedocs.io/en/stable/messaging.html

// delimiter stands between a message's routing and its parts.
const delimiter = "<IDS|MSG>"

// header is a message's header.
type header struct {
	ID      string `json:"msg_id"`
	Session string `json:"session"`
	User    string `json:"username"`
	Date    string `json:"date"`
	Type    string `json:"msg_type"`
	Version string `json:"version"`
}

// message is what a kernel says.
type message struct {
	kind    string // msg_type
	parent  string // ID of the request it belongs to
	content json.RawMessage
	skipped int64 // bytes of a content that was too large, and is nil
}

// wire signs and checks the messages of one kernel.
type wire struct {
	key     []byte
	session string
}

func newWire() wire { return wire{key: []byte(token()), session: token()} }

// token is 128 random bits in hex.
func token() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails: crypto/rand
	return hex.EncodeToString(b)
}

func (w wire) sign(parts [][]byte) []byte {
	mac := hmac.New(sha256.New, w.key)
	for _, p := range parts {
		mac.Write(p)
	}
	sum := mac.Sum(nil)
	out := make([]byte, hex.EncodedLen(len(sum)))
	hex.Encode(out, sum)
	return out
}

// request makes the frames of a request with a new ID.
func (w wire) request(kind string, content, metadata any) (id string, parts [][]byte, err error) {
	id = token()
	head, err := json.Marshal(header{
		ID: id, Session: w.session, User: "cordon", Type: kind, Version: "5.3",
		Date: time.Now().UTC().Format(time.RFC3339Nano),
	})
	if err != nil {
		return "", nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	body, err := json.Marshal(content)
	if err != nil {
		return "", nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	meta, err := json.Marshal(metadata)
	if err != nil {
		return "", nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	signed := [][]byte{head, []byte("{}"), meta, body}
	return id, append([][]byte{[]byte(delimiter), w.sign(signed)}, signed...), nil
}

// decode reads a message and checks its signature. One whose content was skipped
// cannot be checked; it is good for saying so.
func (w wire) decode(f frames) (message, error) {
	parts := f.parts
	for len(parts) > 0 && string(parts[0]) != delimiter {
		parts = parts[1:]
	}
	if len(parts) < 6 {
		return message{}, errors.New("a kernel's message is incomplete")
	}
	signature, signed := parts[1], parts[2:6]
	if f.skipped == 0 && !hmac.Equal(signature, w.sign(signed)) {
		return message{}, errors.New("a kernel's message has a wrong signature")
	}
	var head, parent header
	if err := json.Unmarshal(signed[0], &head); err != nil {
		return message{}, fmt.Errorf("a kernel's message: header: %w", err)
	}
	if err := json.Unmarshal(signed[1], &parent); err != nil {
		return message{}, fmt.Errorf("a kernel's message: parent header: %w", err)
	}
	return message{kind: head.Type, parent: parent.ID, content: signed[3], skipped: f.skipped}, nil
}

// The parts of contents that matter here.
type (
	executeContent struct {
		Code            string         `json:"code"`
		Silent          bool           `json:"silent"`
		StoreHistory    bool           `json:"store_history"`
		UserExpressions map[string]any `json:"user_expressions"`
		AllowStdin      bool           `json:"allow_stdin"`
		// StopOnError would make the kernel refuse what comes shortly after a cell that
		// failed. Cells are sent one by one, so it must not.
		StopOnError bool `json:"stop_on_error"`
	}
	streamContent struct {
		Name string `json:"name"`
		Text string `json:"text"`
	}
	displayContent struct {
		Data map[string]json.RawMessage `json:"data"`
	}
	errorContent struct {
		Name      string   `json:"ename"`
		Value     string   `json:"evalue"`
		Traceback []string `json:"traceback"`
	}
	statusContent struct {
		State  string `json:"execution_state"` // of status
		Status string `json:"status"`          // of a reply
		Count  int    `json:"execution_count"` // of a reply and of execute_input
	}
)
