// Command cordon-probe hides nothing but its standard streams: orders come in
// by one and outcomes leave by the other, a line of JSON each. `cordon
// conformance` puts it into sandboxes.
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
