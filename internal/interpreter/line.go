package interpreter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// line is one line of an execution's answer, as the SDKs read it.
type line map[string]any

// The types of lines.
const (
	lineCount      = "number_of_executions"
	lineStdout     = "stdout"
	lineStderr     = "stderr"
	lineResult     = "result"
	lineError      = "error"
	lineEnd        = "end_of_execution"
	lineUnexpected = "unexpected_end_of_execution"
	lineKeepalive  = "keepalive"
)

// maxText is how much of a stream's text one line holds.
const maxText = 64 << 10

// outputLines cuts a stream's text into lines.
func outputLines(kind, text string) []line {
	var out []line
	now := time.Now().UnixNano()
	for len(text) > 0 {
		n := len(text)
		if n > maxText {
			n = maxText
			for n > maxText-utf8.UTFMax && !utf8.RuneStart(text[n]) {
				n--
			}
		}
		out = append(out, line{"type": kind, "text": text[:n], "timestamp": now})
		text = text[n:]
	}
	return out
}

func errorLine(name, value, traceback string) line {
	return line{"type": lineError, "name": name, "value": value, "traceback": traceback}
}

// keys are what the SDKs call the forms of a result. Other MIME types keep their
// own names.
var keys = map[string]string{
	"text/plain": "text", "text/html": "html", "text/markdown": "markdown", "text/latex": "latex",
	"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpeg", "application/pdf": "pdf",
	"application/json": "json", "application/javascript": "javascript",
	"cordon/data": "data", "cordon/chart": "chart",
}

// resultLine makes a line of a value's forms by MIME type.
func resultLine(forms map[string]json.RawMessage, main bool) line {
	out := line{"type": lineResult, "is_main_result": main}
	extra := map[string]any{}
	for mime, raw := range forms {
		var value any = raw
		var text string
		if json.Unmarshal(raw, &text) == nil {
			value = text
			switch {
			case mime == "text/plain":
				value = unquote(text)
			case strings.HasPrefix(mime, "image/") || mime == "application/pdf":
				value = strings.TrimSpace(text) // base64 with a newline at its end
			}
		}
		if key, ok := keys[mime]; ok {
			out[key] = value
			continue
		}
		// The JavaScript SDKs collect unknown keys, the Python ones read "extra".
		if _, taken := out[mime]; !taken {
			out[mime] = value
		}
		extra[mime] = value
	}
	if len(extra) > 0 {
		out["extra"] = extra
	}
	return out
}

// unquote takes one pair of quotes off: a string's value is shown, not its
// notation.
func unquote(s string) string {
	if len(s) >= 2 && (s[0] == '\'' || s[0] == '"') && s[len(s)-1] == s[0] {
		return s[1 : len(s)-1]
	}
	return s
}

// encode writes a line of JSON in ASCII: the SDKs decode each piece that arrives
// by itself, so a character of several bytes on a seam would be damaged.
func (l line) encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(map[string]any(l)); err != nil {
		return nil, fmt.Errorf("encode a line: %w", err)
	}
	return toASCII(b.Bytes()), nil
}

// toASCII escapes what is not ASCII in a JSON text; in valid JSON that is within
// strings only.
func toASCII(text []byte) []byte {
	if bytes.IndexFunc(text, func(r rune) bool { return r >= utf8.RuneSelf }) < 0 {
		return text
	}
	out := make([]byte, 0, len(text)+len(text)/2)
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		switch {
		case r < utf8.RuneSelf:
			out = append(out, byte(r))
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, hi, lo)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
		text = text[n:]
	}
	return out
}
