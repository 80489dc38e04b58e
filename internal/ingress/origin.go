package ingress

import (
	"net/http"
	"net/url"
	"slices"
)

// Sandboxes are neighbours below one domain, and to a browser pages below one domain
// are of one site: whatever the page of one asks of another, images, forms and
// WebSockets, which need no permission, goes with the other's cookie, however strict
// that is. So a cookie counts only where no page of another sandbox sent it. Pages of
// other sites are kept apart by the browser: the cookie is partitioned.

// planted reports whether a page of another sandbox, or one that hides whose it is,
// made the browser send the request. Pages cannot write the fields this is read from.
func (v *visit) planted(id string) bool {
	site := v.r.Header.Get("Sec-Fetch-Site")
	if site == "same-origin" || site == "none" {
		return false
	}
	if origins := v.r.Header["Origin"]; len(origins) > 0 {
		return slices.ContainsFunc(origins, func(o string) bool { return !v.in.neighbourly(o, id) })
	}
	if site != "same-site" || followed(v.r) {
		return false
	}
	// An image, a script or a frame: from a page of the sandbox's other ports, perhaps.
	from := v.r.Referer()
	return from == "" || !v.in.neighbourly(from, id)
}

// followed reports whether somebody followed a link: only where it leads is shown then.
func followed(r *http.Request) bool {
	return navigates(r) && r.Header.Get("Sec-Fetch-Dest") == "document"
}

// neighbourly reports whether the page at a URL, or with that origin, is the sandbox's
// or of no sandbox at all. The origin "null" is of a page that hides its own.
func (in *Ingress) neighbourly(page, id string) bool {
	u, err := url.Parse(page)
	if err != nil || u.Host == "" {
		return false
	}
	p, err := in.locate(u.Host)
	return err == nil && (p.kind != sandboxHost || p.id == id)
}
