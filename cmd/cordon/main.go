// Command cordon is the server and its command line: sandboxes for untrusted
// code, each behind its own network policy.
package main

import (
	"embed"
	"io/fs"
	"os"

	"github.com/cordonhq/cordon/internal/cli"
	"github.com/cordonhq/cordon/internal/runtime/gvisor"
)

// embedded holds the agent that `make build` put there.
//
//go:embed all:embedded
var embedded embed.FS

func main() {
	stopSampling()
	// Before anything else: this binary is also gVisor's sentry, gofer and
	// helpers, and is started again under their names.
	gvisor.Dispatch()
	programs, err := fs.Sub(embedded, "embedded")
	if err != nil {
		panic(err) // the path is well formed
	}
	os.Exit(cli.Main(programs))
}
