// Command cordon-probe reads orders from its standard input and writes outcomes to its
// standard output, a line of JSON each. `cordon-lab conformance` puts it into sandboxes.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func main() {
	if err := probe.Serve(context.Background(), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "cordon-probe:", err)
		os.Exit(1)
	}
}
