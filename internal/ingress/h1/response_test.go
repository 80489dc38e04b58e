package h1

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"golang.org/x/net/http/httpguts"
)

// parsed is what became of an answer.
type parsed struct {
	Failed          bool
	Status          string
	Code            int
	Proto           string
	Header, Trailer http.Header
	Length          int64
	Coding          []string
	Close, NoBody   bool
	Body            string
	BodyFailed      bool
	Rest            string
}

func parseWith(read func(*bufio.Reader, *http.Request) (*http.Response, error), raw, method string) parsed {
	br := bufio.NewReader(strings.NewReader(raw))
	resp, err := read(br, &http.Request{Method: method})
	if err != nil {
		return parsed{Failed: true}
	}
	p := parsed{Status: resp.Status, Code: resp.StatusCode, Proto: resp.Proto, Header: resp.Header, Length: resp.ContentLength,
		Coding: resp.TransferEncoding, Close: resp.Close, NoBody: resp.Body == http.NoBody}
	b, err := io.ReadAll(resp.Body)
	p.Body, p.BodyFailed, p.Trailer = string(b), err != nil, resp.Trailer
	if err == nil {
		rest, _ := io.ReadAll(br)
		p.Rest = string(rest)
	}
	return p
}

func parseHere(raw, method string) (parsed, []Field) {
	var fields []Field
	p := parseWith(func(br *bufio.Reader, r *http.Request) (resp *http.Response, err error) {
		resp, fields, err = ReadResponse(br, r)
		return resp, err
	}, raw, method)
	return p, fields
}

// responses are read as net/http reads them; the second list is refused here
// and read there.
var responses = []string{
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcrest",
	"HTTP/1.1 200 OK\r\ncontent-LENGTH: 3\r\nX-a: 1\r\nx-A: 2\r\n\r\nabcrest",
	"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\nrest",
	"HTTP/1.1 200 \r\n\r\nuntil the end",
	"HTTP/1.1   404 Not  Found\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.0 200 OK\r\n\r\nuntil the end",
	"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nab",
	"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
	"HTTP/2.0 200 OK\r\nContent-Length: 1\r\n\r\na", "HTTP/0.9 200 OK\r\n\r\na",
	"HTTP/1.1 200 OK\nContent-Length: 3\nA: b\n\nabcrest",
	"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\t d \r\n \r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nA:\r\n b\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\n A: b\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nrest",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-a, b\r\n\r\n3\r\nabc\r\n0\r\nx-A: 1\r\nc: 2\r\n\r\nrest",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n3\r\nabc\r\n0\r\n\r\nrest",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabcd",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chun\u212aed\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
	"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc", "HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc", "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nabc",
	"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
	"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nrest", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\nrest",
	"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\nrest", "HTTP/1.1 304 Not Modified\r\nContent-Length: x\r\n\r\nrest",
	"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nrest", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
	"HTTP/1.1 200 OK\r\nConnection: close, x\r\nContent-Length: 1\r\n\r\na", "HTTP/1.1 200 OK\r\nConnection: x\r\nconnection: Close\r\nContent-Length: 1\r\n\r\na",
	"HTTP/1.1 099 Odd\r\nContent-Length: 1\r\n\r\na", "HTTP/1.1 999 Odd\r\nContent-Length: 1\r\n\r\na",
	"HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 -20 OK\r\n\r\n", "HTTP/1.1 20x OK\r\n\r\n", "HTTP/11 200 OK\r\n\r\n", "HTTP/1.1\r\n\r\n", "\r\nHTTP/1.1 200 OK\r\n\r\n", "", "H", "HTTP/1.1 200 OK\r\nA",
	"HTTP/1.1 200 OK\r\nA\r\n\r\n", "HTTP/1.1 200 OK\r\n: b\r\n\r\n", "HTTP/1.1 200 OK\r\nA\x01: b\r\n\r\n", "HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n", "HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
	"HTTP/1.1 200 OK\r\nTrailer: A\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 9000) + "\r\nContent-Length: 1\r\n\r\nab",
}

func TestResponsesAreReadAsByNetHTTP(t *testing.T) {
	for _, raw := range responses {
		for _, method := range []string{"GET", "HEAD"} {
			ours, _ := parseHere(raw, method)
			theirs := parseWith(http.ReadResponse, raw, method)
			tidy(&theirs)
			if diff := cmp.Diff(theirs, ours); diff != "" {
				t.Errorf("%s %q (-net/http +h1):\n%s", method, raw, diff)
			}
		}
	}
}

func TestResponsesNotReadAsByNetHTTP(t *testing.T) {
	for name, c := range map[string]struct {
		raw    string
		failed bool
		header http.Header
	}{
		"no Cache-Control is made up":           {"HTTP/1.1 200 OK\r\nPragma: no-cache\r\nContent-Length: 0\r\n\r\n", false, http.Header{"Pragma": {"no-cache"}, "Content-Length": {"0"}}},
		"a name with a space goes no further":   {"HTTP/1.1 200 OK\r\nA b: c\r\nD : e\r\nContent-Length: 0\r\n\r\n", false, http.Header{"Content-Length": {"0"}}},
		"unless it would be about the framing":  {"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc", true, nil},
		"nor is a coding with a space read":     {"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n", true, nil},
		"a status has three digits, not a sign": {"HTTP/1.1 +20 OK\r\n\r\n", true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ours, _ := parseHere(c.raw, "GET")
			if ours.Failed != c.failed {
				t.Errorf("failed: %v", ours.Failed)
			}
			if diff := cmp.Diff(c.header, ours.Header); diff != "" {
				t.Error(diff)
			}
			if cmp.Equal(ours, parseWith(http.ReadResponse, c.raw, "GET")) {
				t.Error("net/http does the same: it belongs in the other test")
			}
		})
	}
}

func TestResponseFieldsAsTheyCame(t *testing.T) {
	raw := "HTTP/1.1 200 OK\r\nx-B: 1\r\nSet-cookie: a\r\nCONTENT-type: t\r\nTransfer-encoding: chunked\r\nset-Cookie: b\r\ntrailer: x-T\r\n\r\n1\r\na\r\n0\r\nx-T: 1\r\nX-t: 2\r\n\r\n"
	br := bufio.NewReader(iotest.OneByteReader(strings.NewReader(raw)))
	resp, fields, err := ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Field{{"x-B", "1"}, {"Set-cookie", "a"}, {"CONTENT-type", "t"}, {"Transfer-encoding", "chunked"}, {"set-Cookie", "b"}, {"trailer", "x-T"}}
	if diff := cmp.Diff(want, fields); diff != "" {
		t.Error(diff)
	}
	if got := ResponseTrailers(resp); got != nil {
		t.Errorf("before the end: %v", got)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "a" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if diff := cmp.Diff([]Field{{"x-T", "1"}, {"X-t", "2"}}, ResponseTrailers(resp)); diff != "" {
		t.Error(diff)
	}
	resp.Body.Close()
	if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, http.ErrBodyReadAfterClose) {
		t.Errorf("after Close: %v", err)
	}
}

func TestResponseFieldsAreBounded(t *testing.T) {
	for n, fine := range map[int]bool{maxFields: true, maxFields + 1: false} {
		raw := "HTTP/1.1 200 OK\r\n" + strings.Repeat("a:\n", n) + "\r\n"
		if _, fields, err := ReadResponse(bufio.NewReader(strings.NewReader(raw)), nil); (err == nil) != fine || fine && len(fields) != n {
			t.Errorf("%d fields: got %d, %v", n, len(fields), err)
		}
	}
}

func TestResponseHeadIsBounded(t *testing.T) {
	endless := io.MultiReader(strings.NewReader("HTTP/1.1 200 OK\r\n"), neverEnding{})
	if _, _, err := ReadResponse(bufio.NewReader(endless), nil); !errors.Is(err, errTooLong) {
		t.Errorf("header: %v", err)
	}
	resp, _, err := ReadResponse(bufio.NewReader(io.MultiReader(strings.NewReader("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"), neverEnding{})), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, errTooLong) {
		t.Errorf("trailer: %v", err)
	}
}

// neverEnding is a header without an end.
type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return copy(p, "A: b\r\n"), nil }

// FuzzReadResponse feeds what a service might send. What both read, both read
// the same.
func FuzzReadResponse(f *testing.F) {
	for _, raw := range responses {
		f.Add([]byte(raw), "GET")
	}
	f.Add([]byte(responses[0]), "HEAD")
	f.Fuzz(func(t *testing.T, raw []byte, method string) {
		ours, fields := parseHere(string(raw), method)
		if ours.Failed {
			return
		}
		theirs := parseWith(http.ReadResponse, string(raw), method)
		if theirs.Failed {
			t.Fatalf("net/http refuses it: %+v", ours)
		}
		for _, p := range []*parsed{&ours, &theirs} {
			tidy(p)
		}
		if ours.BodyFailed && !theirs.BodyFailed || !ours.BodyFailed && theirs.BodyFailed && len(raw) < 4<<10 {
			if !strings.Contains(string(raw), "\r\n0") && !strings.Contains(string(raw), "\n0") { // trailers are read more strictly
				t.Fatalf("bodies: %+v\n%+v", ours, theirs)
			}
			return
		}
		if theirs.BodyFailed {
			ours.Trailer, theirs.Trailer = nil, nil
		}
		if diff := cmp.Diff(theirs, ours); diff != "" {
			t.Fatalf("-net/http +h1:\n%s", diff)
		}
		for _, fl := range fields {
			if !httpguts.ValidHeaderFieldName(fl.Name) || !httpguts.ValidHeaderFieldValue(fl.Value) {
				t.Fatalf("field %q", fl)
			}
		}
	})
}

// tidy takes away what is different on purpose.
func tidy(p *parsed) {
	if h := p.Header; len(h["Pragma"]) > 0 && h["Pragma"][0] == "no-cache" && len(h["Cache-Control"]) == 1 && h["Cache-Control"][0] == "no-cache" {
		delete(h, "Cache-Control")
	}
	for name, values := range p.Header {
		for i := range values {
			values[i] = trim(values[i]) // of a fold at the end
		}
		if strings.Contains(name, " ") {
			delete(p.Header, name)
		}
	}
	for name := range p.Trailer {
		if strings.Contains(name, " ") {
			delete(p.Trailer, name)
		}
	}
}
