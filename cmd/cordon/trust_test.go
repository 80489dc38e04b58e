package main

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
)

// TestTrust works on a root folder of its own, never on the machine's stores.
func TestTrust(t *testing.T) {
	dir, root := t.TempDir(), t.TempDir()
	_, ca, err := tlsconf.LocalCA(dir, []string{"sbx.test"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(root, "usr/local/share/ca-certificates")
	db := filepath.Join(root, "home/alice/.pki/nssdb")
	for _, d := range []string{store, db} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	certutil, err := exec.LookPath("certutil")
	if err != nil {
		t.Skip("certutil is missing: sudo apt-get install libnss3-tools")
	}
	nss := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), certutil, append(args, "-d", "sql:"+db)...).CombinedOutput()
		if err != nil {
			t.Fatalf("certutil %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	nss("-N", "--empty-password")
	said := filepath.Join(dir, "said")
	run := func(args ...string) string {
		t.Helper()
		f, err := os.Create(said)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := newRoot(&app{environ: map[string]string{}, out: f, errOut: f})
		cmd.SetArgs(append([]string{"trust", "--root", root, "--ca", ca}, args...))
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatalf("trust %v: %v", args, err)
		}
		b, err := os.ReadFile(said)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	state := func() string {
		t.Helper()
		files, err := os.ReadDir(store)
		if err != nil {
			t.Fatal(err)
		}
		out := ""
		for _, f := range files {
			out += f.Name() + " "
		}
		for line := range strings.Lines(nss("-L")) {
			if strings.HasPrefix(line, "cordon-") {
				out += strings.Join(strings.Fields(line), " ")
			}
		}
		return out
	}
	if out := run("--dry-run"); state() != "" || !strings.Contains(out, "would: write "+store) || !strings.Contains(out, "would: add the CA to "+db) {
		t.Errorf("a dry run left %q and said %s", state(), out)
	}
	out := run()
	first := state()
	if !strings.Contains(first, ".crt cordon-") || !strings.HasSuffix(first, "C,,") {
		t.Errorf("installed: %q", first)
	}
	for _, want := range []string{"NODE_EXTRA_CA_CERTS=" + ca, "SSL_CERT_FILE=", "REQUESTS_CA_BUNDLE=", "keytool"} {
		if !strings.Contains(out, want) {
			t.Errorf("no hint %s in %s", want, out)
		}
	}
	if out := run(); state() != first || strings.Count(out, "as it should be") != 2 {
		t.Errorf("the second time: %q and %s", state(), out)
	}
	run("--uninstall")
	if got := state(); got != "" {
		t.Errorf("after uninstalling: %q", got)
	}
	if out := run("--uninstall"); strings.Count(out, "as it should be") != 2 {
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
