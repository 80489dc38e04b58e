package cli

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
)

// trusting is a root folder of its own, never the machine's stores, with a system
// store, one user's database, and a CA.
type trusting struct {
	t                   *testing.T
	dir, root, ca       string
	store, db, certutil string
}

func newTrusting(t *testing.T) *trusting {
	f := &trusting{t: t, dir: t.TempDir(), root: t.TempDir()}
	var err error
	if _, f.ca, err = tlsconf.LocalCA(f.dir, []string{"sbx.test"}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	f.store = filepath.Join(f.root, "usr/local/share/ca-certificates")
	f.db = filepath.Join(f.root, "home/alice/.pki/nssdb")
	for _, d := range []string{f.store, f.db} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if f.certutil, err = exec.LookPath("certutil"); err != nil {
		t.Skip("certutil is missing: sudo apt-get install libnss3-tools")
	}
	f.nss("-N", "--empty-password")
	return f
}

// nss runs certutil on the database.
func (f *trusting) nss(args ...string) string {
	f.t.Helper()
	out, err := exec.CommandContext(f.t.Context(), f.certutil, append(args, "-d", "sql:"+f.db)...).CombinedOutput()
	if err != nil {
		f.t.Fatalf("certutil %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// run runs the verb and returns what it says.
func (f *trusting) run(args ...string) string {
	f.t.Helper()
	said := filepath.Join(f.dir, "said")
	out, err := os.Create(said)
	if err != nil {
		f.t.Fatal(err)
	}
	defer out.Close()
	cmd := newRoot(&app{environ: map[string]string{}, out: out, errOut: out})
	cmd.SetArgs(append([]string{"trust", "--root", f.root, "--ca", f.ca}, args...))
	if err := cmd.ExecuteContext(f.t.Context()); err != nil {
		f.t.Fatalf("trust %v: %v", args, err)
	}
	b, err := os.ReadFile(said)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b)
}

// state is what the two stores hold.
func (f *trusting) state() string {
	f.t.Helper()
	files, err := os.ReadDir(f.store)
	if err != nil {
		f.t.Fatal(err)
	}
	out := ""
	for _, file := range files {
		out += file.Name() + " "
	}
	for line := range strings.Lines(f.nss("-L")) {
		if strings.HasPrefix(line, "cordon-") {
			out += strings.Join(strings.Fields(line), " ")
		}
	}
	return out
}

func TestTrust(t *testing.T) {
	f := newTrusting(t)
	if out := f.run("--dry-run"); f.state() != "" || !strings.Contains(out, "would: write "+f.store) || !strings.Contains(out, "would: add the CA to "+f.db) {
		t.Errorf("a dry run left %q and said %s", f.state(), out)
	}
	out := f.run()
	first := f.state()
	if !strings.Contains(first, ".crt cordon-") || !strings.HasSuffix(first, "C,,") {
		t.Errorf("installed: %q", first)
	}
	for _, want := range []string{"NODE_EXTRA_CA_CERTS=" + f.ca, "SSL_CERT_FILE=", "REQUESTS_CA_BUNDLE=", "keytool"} {
		if !strings.Contains(out, want) {
			t.Errorf("no hint %s in %s", want, out)
		}
	}
	if out := f.run(); f.state() != first || strings.Count(out, "as it should be") != 2 {
		t.Errorf("the second time: %q and %s", f.state(), out)
	}
	f.run("--uninstall")
	if got := f.state(); got != "" {
		t.Errorf("after uninstalling: %q", got)
	}
	if out := f.run("--uninstall"); strings.Count(out, "as it should be") != 2 {
		t.Errorf("uninstalled twice: %s", out)
	}
}

func TestTrustRefusesWhatIsNoCA(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := tlsconf.LocalCA(dir, []string{"sbx.test"}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "junk.pem"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"leaf.pem", "leaf.key", "junk.pem", "absent.pem"} {
		cmd := newRoot(&app{environ: map[string]string{}, out: os.Stdout, errOut: os.Stderr})
		cmd.SetArgs([]string{"trust", "--root", t.TempDir(), "--ca", filepath.Join(dir, file)})
		if err := cmd.ExecuteContext(t.Context()); err == nil {
			t.Errorf("%s was accepted", file)
		}
	}
}
