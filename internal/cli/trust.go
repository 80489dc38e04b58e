package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/internal/server"
	"github.com/cordonhq/cordon/internal/statefile"
	"github.com/spf13/cobra"

	"github.com/cordonhq/cordon/internal/errs"
)

func trustCommand(a *app) *cobra.Command {
	var t trust
	cmd := &cobra.Command{
		Use: "trust", Short: "Make this machine's programs and browsers trust the server's CA",
		Long: `trust puts the certificate of the CA that cordon made for itself (see cordon env)
where programs look: the system's store, and the NSS databases of the users, which
Firefox and Chromium read. It prints what to set for programs with a store of their
own. The CA may sign for the server's domains only. Running it again changes
nothing; --uninstall takes back what it did.`,
		Example: `  sudo cordon trust
  sudo cordon trust --dry-run
  sudo cordon trust --uninstall
  sudo cordon trust --ca ca.pem      the CA of a server on another machine`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if t.file == "" && !cfg.TLS.LocalCA() {
				return errs.New(errs.Invalid, "this server's certificates are not from a CA of its own: there is nothing to trust (--ca names another)")
			}
			t.file, t.out = cmp.Or(t.file, cfg.CaFile()), a
			return t.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.file, "ca", "", "PEM file with one CA certificate (default: this server's)")
	f.BoolVar(&t.uninstall, "uninstall", false, "take the certificate out again")
	f.BoolVar(&t.dryRun, "dry-run", false, "say what would be done and change nothing")
	f.StringVar(&t.root, "root", "/", "the system's root folder, to prepare an image; no program of the system is run then")
	return cmd
}

// trust is one run of the verb.
type trust struct {
	file, root        string
	uninstall, dryRun bool
	out               *app

	cert []byte // PEM
	name string // of files and nicknames: tells one CA from another
}

// systemStores are where distributions look for further CAs, and what they run
// afterwards (update-ca-certificates(8), update-ca-trust(8)).
func systemStores() []struct{ dir, update string } {
	return []struct{ dir, update string }{
		{"usr/local/share/ca-certificates", "update-ca-certificates"},   // Debian, Ubuntu, Alpine
		{"etc/pki/ca-trust/source/anchors", "update-ca-trust"},          // Fedora, RHEL
		{"etc/ca-certificates/trust-source/anchors", "update-ca-trust"}, // Arch
		{"usr/share/pki/trust/anchors", "update-ca-certificates"},       // openSUSE
	}
}

func (t *trust) run(ctx context.Context) error {
	if err := t.read(); err != nil {
		return err
	}
	if info, err := os.Stat(t.root); err != nil || !info.IsDir() {
		return errs.New(errs.Invalid, "--root is %q, which is no folder: use the root folder of a system", t.root)
	}
	if !t.dryRun && t.root == "/" && os.Geteuid() != 0 {
		return errors.New("cordon trust needs root, for the system's store: run it with sudo")
	}
	if err := t.system(ctx); err != nil {
		return err
	}
	if err := t.browsers(ctx); err != nil {
		return err
	}
	if !t.uninstall {
		t.hints()
	}
	return nil
}

// read takes the certificate in and refuses what is no CA.
func (t *trust) read() error {
	b, err := os.ReadFile(t.file)
	if errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Invalid, "%s does not exist: start the server once (sudo cordon serve), or name a file with --ca", t.file)
	}
	if err != nil {
		return fmt.Errorf("read the CA: %w", err)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return errs.New(errs.Invalid, "%s: use a PEM file with one certificate and nothing else", t.file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return errs.Wrap(errs.Invalid, err, "%s", t.file)
	}
	if !cert.IsCA || time.Now().After(cert.NotAfter) {
		return errs.New(errs.Invalid, "%s: %s is no CA, or is not valid any more", t.file, cert.Subject)
	}
	sum := sha256.Sum256(block.Bytes)
	t.name = "cordon-" + hex.EncodeToString(sum[:4])
	t.cert = pem.EncodeToMemory(block)
	return nil
}

// say tells of a step that is taken, or would be.
func (t *trust) say(format string, args ...any) {
	if t.dryRun {
		format = "would: " + format
	}
	t.note(format, args...)
}

// note tells how things are.
func (t *trust) note(format string, args ...any) { fmt.Fprintf(t.out.out, format+"\n", args...) }

// system adds the certificate to the distribution's store or takes it out.
func (t *trust) system(ctx context.Context) error {
	for _, s := range systemStores() {
		dir := filepath.Join(t.root, s.dir)
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			continue
		}
		file := filepath.Join(dir, t.name+".crt")
		changed, err := t.place(file)
		if err != nil {
			return fmt.Errorf("system store: %w", err)
		}
		if !changed {
			t.note("%s is as it should be", file)
			return nil
		}
		return t.update(ctx, s.update)
	}
	t.note("no system store found below %s: this distribution is not known, its own tools can add %s", t.root, t.file)
	return nil
}

// place writes or removes the file, and reports whether that changed anything.
func (t *trust) place(file string) (changed bool, err error) {
	have, err := os.ReadFile(file)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false, err
	case t.uninstall && err != nil, !t.uninstall && err == nil && bytes.Equal(have, t.cert):
		return false, nil
	case t.uninstall:
		t.say("remove %s", file)
		if t.dryRun {
			return true, nil
		}
		return true, os.Remove(file)
	}
	t.say("write %s", file)
	if t.dryRun {
		return true, nil
	}
	return true, statefile.Replace(file, t.cert, 0o644)
}

// update makes the system read its store again. Another root is another system.
func (t *trust) update(ctx context.Context, program string) error {
	if t.root != "/" {
		t.say("run %s there", program)
		return nil
	}
	args := []string{}
	if t.uninstall && program == "update-ca-certificates" {
		args = append(args, "--fresh") // forgets what is gone
	}
	t.say("run %s", strings.Join(append([]string{program}, args...), " "))
	if t.dryRun {
		return nil
	}
	return quietly(ctx, program, args...)
}

// quietly runs a program that has two minutes and whose output is shown when it fails.
func quietly(ctx context.Context, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return orOutput(exec.CommandContext(ctx, program, args...))
}

// orOutput runs a program; the error has its output.
func orOutput(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd.Args[0], err, bytes.TrimSpace(out))
	}
	return nil
}

// nssPlaces are where users' databases are, below a home (Chromium's
// linux_cert_management.md; Firefox, also as snap and Flatpak).
func nssPlaces() []string {
	return []string{
		".pki/nssdb", "snap/chromium/current/.pki/nssdb", ".mozilla/firefox/*", ".config/mozilla/firefox/*",
		"snap/firefox/common/.mozilla/firefox/*", ".var/app/org.mozilla.firefox/.mozilla/firefox/*",
	}
}

// browsers does the same for NSS databases.
func (t *trust) browsers(ctx context.Context) error {
	var dbs []string
	for _, home := range []string{"root", "home/*"} {
		for _, p := range nssPlaces() {
			found, err := filepath.Glob(filepath.Join(t.root, home, p, "cert9.db"))
			if err != nil {
				return err
			}
			for _, f := range found {
				dbs = append(dbs, filepath.Dir(f))
			}
		}
	}
	slices.Sort(dbs)
	if len(dbs) == 0 {
		t.note("no browser's certificate store found; one that is made later needs this again")
		return nil
	}
	certutil, err := exec.LookPath("certutil")
	if err != nil {
		t.note("certutil is missing, so browsers do not trust the CA yet: sudo apt-get install libnss3-tools (Fedora: nss-tools, Arch: nss), then run this again")
		return nil
	}
	var failed []error
	for _, db := range dbs {
		failed = append(failed, t.database(ctx, certutil, db))
	}
	return errors.Join(failed...)
}

// database adds the certificate to one database as a CA for web servers, or takes
// it out.
func (t *trust) database(ctx context.Context, certutil, db string) error {
	info, err := os.Stat(db)
	if err != nil {
		return err
	}
	n := nss{certutil: certutil, db: db, owner: info}
	has := n.run(ctx, nil, "-L", "-n", t.name) == nil
	switch {
	case has != t.uninstall: // there and wanted, or gone and unwanted
		t.note("%s is as it should be", db)
		return nil
	case t.uninstall:
		t.say("take the CA out of %s", db)
	default:
		t.say("add the CA to %s", db)
	}
	switch {
	case t.dryRun:
		return nil
	case t.uninstall:
		return n.run(ctx, nil, "-D", "-n", t.name)
	}
	return n.run(ctx, t.cert, "-A", "-a", "-n", t.name, "-t", "C,,")
}

// nss is one user's database.
type nss struct {
	certutil, db string
	owner        fs.FileInfo // of db
}

// run runs certutil on the database as its owner: what a user can replace by a link
// must not be written by root.
func (n nss) run(ctx context.Context, input []byte, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.certutil, append(args, "-d", "sql:"+n.db)...)
	cmd.Stdin = bytes.NewReader(input)
	if os.Geteuid() == 0 {
		st, ok := n.owner.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: owner of %s not known", n.certutil, n.db)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: st.Uid, Gid: st.Gid}}
		cmd.Dir = "/"
	}
	return orOutput(cmd)
}

// hints are for programs that read neither.
func (t *trust) hints() {
	bundle := filepath.Join(filepath.Dir(t.file), filepath.Base((&server.Config{}).HostBundle()))
	if _, err := os.Stat(bundle); err != nil {
		bundle = "/etc/ssl/certs/ca-certificates.crt"
	}
	fmt.Fprintf(t.out.out, `
Programs with a store of their own:
  Node            export NODE_EXTRA_CA_CERTS=%[1]s
  Python (ssl)    export SSL_CERT_FILE=%[2]s
  Python requests export REQUESTS_CA_BUNDLE=%[2]s
  Java            sudo keytool -importcert -noprompt -cacerts -storepass changeit -alias %[3]s -file %[1]s
`, t.file, bundle, t.name)
}
