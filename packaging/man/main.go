// Command man writes the man pages of cordon's verbs, section 1, into a folder:
//
//	go run ./packaging/man <folder> <version> <date as 2006-01-02>
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra/doc"

	"github.com/cordonhq/cordon/internal/cli"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "man:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("want a folder, a version and a date, got %d arguments", len(args))
	}
	date, err := time.Parse(time.DateOnly, args[2])
	if err != nil {
		return err
	}
	root := cli.Command()
	root.DisableAutoGenTag = true
	return doc.GenManTree(root, &doc.GenManHeader{
		Section: "1", Source: "cordon " + args[1], Manual: "cordon", Date: &date,
	}, args[0])
}
