package ingress

import (
	"net/http"
	"net/url"
	"slices"
)

// Sandboxes are neighbours below one domain, and to a browser pages below one domain
// are of one site: whatever the page of one asks of another, images, forms and
// WebSockets, which need no permission, goes with the other's cookie, however strict
// that is, unless the domain is in the Public Suffix List. So a cookie counts only
// where no page of another sandbox sent it. What pages of other sites load goes without
// the cookie, which is partitioned; but when one of them leads the browser to the
// sandbox, by a link or a form, the sandbox is the site then and the cookie goes along.
// Links are meant to work. Forms are not, since they make the service do something.

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

// formElsewhere reports whether a page of another site leads the browser to the sandbox
// by a method other than GET and HEAD. Browsers that do not say so much are judged by
// Origin, which they all send with such methods.
func (v *visit) formElsewhere(id string) bool {
	if v.r.Method == http.MethodGet || v.r.Method == http.MethodHead {
		return false
	}
	switch v.r.Header.Get("Sec-Fetch-Site") {
	case "same-origin", "same-site", "none":
		return false // same-site: see planted
	case "cross-site":
		switch v.r.Header.Get("Sec-Fetch-Mode") {
		case "cors", "no-cors":
			return false // not a navigation
		}
		return !v.in.ownPage(v.r.Header.Get("Origin"), id)
	}
	origins := v.r.Header["Origin"]
	return slices.ContainsFunc(origins, func(o string) bool { return !v.in.ownPage(o, id) })
}

// followed reports whether somebody followed a link: only where it leads is shown then.
func followed(r *http.Request) bool {
	return navigates(r) && r.Header.Get("Sec-Fetch-Dest") == "document"
}

// neighbourly reports whether the page at a URL, or with that origin, is the sandbox's
// or of no sandbox at all. The origin "null" is of a page that hides its own.
func (in *Ingress) neighbourly(page, id string) bool {
	p, ok := in.pageOf(page)
	return ok && (p.kind != sandboxHost || p.id == id)
}

// ownPage reports whether the page at a URL, or with that origin, is the sandbox's.
func (in *Ingress) ownPage(page, id string) bool {
	p, ok := in.pageOf(page)
	return ok && p.kind == sandboxHost && p.id == id
}

func (in *Ingress) pageOf(page string) (place, bool) {
	u, err := url.Parse(page)
	if err != nil || u.Host == "" {
		return place{}, false
	}
	p, err := in.locate(u.Host)
	return p, err == nil
}
