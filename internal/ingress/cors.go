package ingress

import (
	"net/http"

	"golang.org/x/net/http/httpguts"
)

// preflight reports whether a browser asks, before a request of a page, whether it
// may send it (Fetch, section 4.8). It carries no credentials by its standard, so
// none can be demanded of it; the request behind it carries them.
func preflight(r *http.Request) bool {
	method := r.Header["Access-Control-Request-Method"]
	return r.Method == http.MethodOptions && r.ContentLength == 0 && len(r.Header["Origin"]) == 1 &&
		len(method) == 1 && httpguts.ValidHeaderFieldName(method[0])
}

// permit answers a preflight in the service's place, which without a token is not
// reached, nor woken. It permits what the page asks for, because the request behind
// it shows the token and the service's answer still says who may read it. Only pages
// of the sandbox itself may send the cookie along.
func (v *visit) permit(id string) {
	h, origin := v.w.Header(), v.r.Header.Get("Origin")
	h.Set("Access-Control-Allow-Origin", "*")
	if v.in.ownPage(origin, id) {
		h.Set("Access-Control-Allow-Origin", origin)
		h.Set("Access-Control-Allow-Credentials", "true")
	}
	h.Set("Access-Control-Allow-Methods", v.r.Header.Get("Access-Control-Request-Method"))
	if fields := v.r.Header["Access-Control-Request-Headers"]; len(fields) > 0 {
		h["Access-Control-Allow-Headers"] = fields // "*" would leave Authorization out
	}
	h.Set("Cache-Control", "no-store")
	h.Set("Vary", "Origin, Access-Control-Request-Method, Access-Control-Request-Headers")
	v.code = http.StatusNoContent
	v.w.WriteHeader(v.code)
}
