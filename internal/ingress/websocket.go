package ingress

import (
	"crypto/rand"
	"encoding/base64"
	"maps"
	"net/http"
	"strings"
)

// protocolField is where the HTTP/2 server puts the pseudo-header :protocol.
const protocolField = ":protocol"

// streamed turns an extended CONNECT (RFC 8441, section 4) into the upgrade of
// RFC 6455 that it stands for, so that everything behind sees one kind of
// WebSocket. What the client sends on its stream is in v.stream from then on.
func (v *visit) streamed() *refusal {
	if v.r.Method != http.MethodConnect || v.r.Header[protocolField] == nil {
		return nil
	}
	if protocol := v.r.Header.Get(protocolField); !strings.EqualFold(protocol, "websocket") {
		return &refusal{Code: http.StatusNotImplemented, Message: "Protocol " + shown(protocol) + " is not served over an HTTP/2 stream: use websocket."}
	}
	r := v.r.WithContext(v.r.Context())
	r.Header = maps.Clone(r.Header)
	delete(r.Header, protocolField)
	var key [16]byte
	rand.Read(key[:])
	r.Header["Sec-Websocket-Key"] = []string{base64.StdEncoding.EncodeToString(key[:])}
	v.stream, r.Body = r.Body, http.NoBody
	r.Method, r.ContentLength = http.MethodGet, 0
	v.r = r
	return nil
}
