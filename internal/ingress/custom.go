package ingress

// locate reads a Host header; see domains.parse. A custom domain is the host of the
// sandbox that it leads to.
func (in *Ingress) locate(host string) (place, error) {
	p, err := in.domains.parse(host)
	if err != nil || p.kind != foreignHost || in.cfg.Custom == nil {
		return p, err
	}
	if id, port, ok := in.cfg.Custom(p.name); ok {
		p.kind, p.id, p.port = sandboxHost, id, port
	}
	return p, nil
}
