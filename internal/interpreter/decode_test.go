package interpreter

import (
	"bufio"
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// FuzzFrames reads what a kernel sends: nothing may be allocated that was not sent.
func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, flagMore, []byte("a")), 0, bytes.Repeat([]byte("b"), 300)))
	f.Add([]byte{flagLong, 0, 0, 0, 0, 2, 0, 0, 1, 'x'}) // says more than it holds
	f.Add([]byte{flagLong, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Add(appendFrame(appendFrame(nil, flagCommand, []byte("\x05READY")), 0, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			m, err := readMessage(r)
			if err != nil {
				return
			}
			size := 0
			for _, p := range m.parts {
				size += len(p)
			}
			if len(m.parts) == 0 || len(m.parts) > maxFrames || size > len(b) || m.skipped > int64(len(b)) {
				t.Fatalf("%d parts of %d bytes, %d skipped, from %d", len(m.parts), size, m.skipped, len(b))
			}
		}
	})
}

// FuzzMessage decodes a kernel's message, signed and not, down to lines.
func FuzzMessage(f *testing.F) {
	f.Add("stream", `{"name":"stdout","text":"x"}`)
	f.Add("execute_result", `{"data":{"text/plain":"'x'","image/png":"eA==\n","type":"stdout","x":{"y":[1]}}}`)
	f.Add("error", `{"ename":"E","evalue":"v","traceback":["a","b"]}`)
	f.Add("status", `{"execution_state":"idle"}`)
	f.Add("execute_input", `{"execution_count":1}`)
	w := wire{key: []byte("key")}
	f.Fuzz(func(t *testing.T, kind, content string) {
		head, err := json.Marshal(header{ID: "1", Type: kind})
		if err != nil {
			t.Skip()
		}
		signed := [][]byte{head, []byte(`{"msg_id":"2"}`), []byte("{}"), []byte(content)}
		parts := append([][]byte{[]byte("topic"), []byte(delimiter), w.sign(signed)}, signed...)
		m, err := w.decode(frames{parts: parts})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range published(m) {
			checkLine(t, l)
		}
		parts[2] = []byte("forged")
		if _, err := w.decode(frames{parts: parts}); err == nil {
			t.Fatal("a forged message was taken")
		}
	})
}

func checkLine(t *testing.T, l line) {
	t.Helper()
	b, err := l.encode()
	if err != nil {
		t.Fatal(err)
	}
	var back struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(b, &back); err != nil || bytes.Count(b, []byte("\n")) != 1 || b[len(b)-1] != '\n' {
		t.Fatalf("%q is not a line of JSON: %v", b, err)
	}
	switch back.Type {
	case lineCount, lineStdout, lineStderr, lineResult, lineError:
	default:
		t.Fatalf("%q has a type of the kernel's own", b)
	}
	for _, c := range b {
		if c >= utf8.RuneSelf {
			t.Fatalf("%q is not ASCII", b)
		}
	}
}

// FuzzMarks splits a program's output at any place: nothing is lost but marks, and
// where it is cut does not matter.
func FuzzMarks(f *testing.F) {
	mark := "\x00" + strings.Repeat("a", markSize) + "\x00"
	f.Add("before"+mark+"after", 3)
	f.Add("☃"+mark+mark+"\x00abc", 1)
	f.Add(mark[:20]+"x\xff\xf0\x9f", 2)
	f.Fuzz(func(t *testing.T, in string, step int) {
		step = max(1, step%64)
		read := func(step int) (text string, marks int) {
			var s splitter
			for b := []byte(in); len(b) > 0; {
				n := min(step, len(b))
				for _, p := range s.split(b[:n]) {
					text += p.text
					if p.mark != "" {
						marks++
					}
				}
				b = b[n:]
			}
			if len(s.kept) > markSize+2 {
				t.Fatalf("%d bytes kept", len(s.kept))
			}
			return text + strings.ToValidUTF8(string(s.kept), ""), marks
		}
		whole, n := read(len(in) + 1)
		cut, m := read(step)
		if n != m {
			t.Fatalf("%d marks, %d when cut", n, m)
		}
		if utf8.ValidString(in) && whole != cut {
			t.Fatalf("%q, when cut %q", whole, cut)
		}
	})
}

func TestLines(t *testing.T) {
	for name, c := range map[string]struct {
		forms string
		want  line
	}{
		"a string without its quotes":      {`{"text/plain":"'it'"}`, line{"type": "result", "is_main_result": true, "text": "it"}},
		"one quote is none":                {`{"text/plain":"'"}`, line{"type": "result", "is_main_result": true, "text": "'"}},
		"a picture without its newline":    {`{"image/png":"eA==\n"}`, line{"type": "result", "is_main_result": true, "png": "eA=="}},
		"a type of one's own is no type":   {`{"type":"x"}`, line{"type": "result", "is_main_result": true, "extra": map[string]any{"type": "x"}}},
		"other types keep their own names": {`{"a/b":"x"}`, line{"type": "result", "is_main_result": true, "a/b": "x", "extra": map[string]any{"a/b": "x"}}},
	} {
		t.Run(name, func(t *testing.T) {
			var forms map[string]json.RawMessage
			if err := json.Unmarshal([]byte(c.forms), &forms); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, resultLine(forms, true)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestShellVariables(t *testing.T) {
	value := "it's \"$x\"\n"
	if got, want := assign("A", &value), "export A='it'\\''s \"$x\"\n'\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, name := range []string{"a b", "1a", "a;rm", "a\nb", ""} {
		if got := assign(name, &value); got != "" {
			t.Errorf("%q became %q", name, got)
		}
	}
}
