package agent

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/cordonhq/cordon/internal/agent/proof"
	"github.com/cordonhq/cordon/internal/agent/wire"
)

// claim is what the host tells the agent about its sandbox. It is immutable: a
// later claim replaces it whole.
type claim struct {
	wire.Claim

	env     map[string]string // of every command: EnvVars and who the sandbox is
	control *proof.Key        // ControlHash, decoded
}

// postInit claims the sandbox, or claims it anew after a restore. Everything is
// checked before anything changes.
func (a *Agent) postInit(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJSON))
	if err != nil {
		writeError(w, http.StatusBadRequest, "the request body is over 1 MiB or broken off")
		return
	}
	c := &claim{}
	if err := json.Unmarshal(raw, c); err != nil {
		writeError(w, http.StatusBadRequest, "the request body is not the expected JSON: "+err.Error())
		return
	}
	if err := c.complete(); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	a.claiming.Lock()
	defer a.claiming.Unlock()
	// Clones of one checkpoint share the kernel's random state; the body holds
	// what differs: token, ID and time.
	if err := a.claimed(c, raw); err != nil {
		a.log.Error("sandbox not claimed", "sandbox", c.SandboxID, "err", err)
		writeError(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// claimed applies a claim; the token is replaced last, so that nobody is served
// under a half-applied one.
func (a *Agent) claimed(c *claim, seed []byte) error {
	if err := reseed(seed); err != nil {
		return err
	}
	if err := a.applyHostname(c.Hostname); err != nil {
		return err
	}
	if err := a.applyResolver(); err != nil {
		return err
	}
	a.keepAddresses()
	a.guard.forget()
	a.claim.Store(c)
	a.log.Info("sandbox claimed", "sandbox", c.SandboxID, "host", c.Hostname)
	return nil
}

// complete checks a claim and computes what follows from it.
func (c *claim) complete() error {
	if c.DefaultUser == "" {
		c.DefaultUser = "user"
	}
	if c.Hostname != "" && !isLabel(c.Hostname) {
		return fmt.Errorf("hostname %q: use 1 to 63 letters, digits and hyphens", c.Hostname)
	}
	if c.ControlHash != "" {
		raw, err := hex.DecodeString(c.ControlHash)
		if err != nil || len(raw) != sha256.Size {
			return errors.New("controlHash: want the 64 hex digits of a SHA-256")
		}
		c.control = (*proof.Key)(raw)
	}
	for k, v := range c.EnvVars {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return fmt.Errorf("envVars: %q is not a variable's name or its value has a NUL byte", k)
		}
	}
	c.env = map[string]string{"E2B_SANDBOX": "true", "NOVITA_SANDBOX": "true"}
	for name, id := range map[string]string{"SANDBOX_ID": c.SandboxID, "TEMPLATE_ID": c.TemplateID} {
		if id != "" {
			c.env["E2B_"+name], c.env["NOVITA_"+name] = id, id
		}
	}
	maps.Copy(c.env, c.EnvVars)
	return nil
}

// isLabel reports whether s is a label of RFC 1123, section 2.1.
func isLabel(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	return len(s) <= 63 && strings.Trim(s, letters+"-") == "" && s[0] != '-' && s[len(s)-1] != '-'
}

// getEnvs serves the environment every command gets.
func (a *Agent) getEnvs(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, a.claim.Load().env)
}

// reseed stirs bytes into the kernel's random pool.
func reseed(seed []byte) error {
	sum := sha512.Sum512(seed)
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(sum[:]); err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	return nil
}

// The lines between the markers are ours and rewritten at each claim; what users
// write around them stays.
const (
	blockBegin = "# cordon: begin, rewritten by the sandbox's agent"
	blockEnd   = "# cordon: end"
)

// applyHostname names the machine and makes the name and its addresses resolve
// without DNS: programs that look their own name up wait for seconds otherwise.
func (a *Agent) applyHostname(name string) error {
	if name == "" {
		return nil
	}
	if err := a.setHostname(name); err != nil {
		return err
	}
	if err := replaceFile(a.etc("hostname"), []byte(name+"\n")); err != nil {
		return err
	}
	old, err := readBounded(a.etc("hosts"))
	if err != nil {
		return err
	}
	return replaceFile(a.etc("hosts"), hostsFile(old, name, a.ownAddresses()))
}

// setHostname changes the kernel's host name unless the runtime gave it already.
// A runtime that withholds CAP_SYS_ADMIN keeps the name it started with; then
// the claimed one only resolves.
func (a *Agent) setHostname(name string) error {
	if a.cfg.SetHostname == nil {
		return nil
	}
	if have, err := os.Hostname(); err == nil && have == name {
		return nil
	}
	err := a.cfg.SetHostname(name)
	if errors.Is(err, fs.ErrPermission) {
		a.log.Warn("host name not changed", "host", name, "err", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	return nil
}

// hostsFile puts our block into an old hosts file, in the place of the former one.
func hostsFile(old []byte, name string, own []netip.Addr) []byte {
	var block bytes.Buffer
	fmt.Fprintln(&block, blockBegin)
	fmt.Fprintln(&block, "127.0.0.1\tlocalhost")
	fmt.Fprintln(&block, "::1\tlocalhost ip6-localhost ip6-loopback")
	for _, a := range own {
		fmt.Fprintf(&block, "%s\t%s\n", a, name)
	}
	if len(own) == 0 {
		fmt.Fprintf(&block, "127.0.1.1\t%s\n", name)
	}
	fmt.Fprintln(&block, blockEnd)

	before, rest, found := bytes.Cut(old, []byte(blockBegin))
	if !found {
		return append(block.Bytes(), old...)
	}
	_, after, closed := bytes.Cut(rest, []byte(blockEnd))
	if !closed { // somebody cut our block: what follows it cannot be told apart
		after = nil
	}
	after = bytes.TrimPrefix(after, []byte("\n"))
	return append(append(bytes.Clone(before), block.Bytes()...), after...)
}

// resolvConf names servers the host answers for, whatever address is asked: the
// sandbox's packets to port 53 all go to cordon's resolver.
const resolvConf = "# cordon: written by the sandbox's agent; remove this line to keep your own\nnameserver 8.8.8.8\nnameserver 1.1.1.1\n"

func (a *Agent) applyResolver() error {
	old, err := readBounded(a.etc("resolv.conf"))
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(old)) > 0 && !bytes.HasPrefix(old, []byte("# cordon:")) {
		return nil
	}
	return replaceFile(a.etc("resolv.conf"), []byte(resolvConf))
}

func (a *Agent) etc(name string) string { return filepath.Join(a.cfg.Etc, name) }

// readBounded reads a small file; a missing one is empty.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxJSON))
}

// replaceFile writes a file as a whole. Where the old one cannot be renamed
// over, because it is a mount, it is written in place.
func replaceFile(path string, content []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already when all went well
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if os.Rename(tmp.Name(), path) == nil {
		return nil
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
