// Command change-the-network gives a sandbox other rules while it runs: first everything to
// install what it needs, then only what untrusted code may reach.
//
// It prints:
//
//	before: 200
//	after: refused
//	still allowed: 200
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/cordonhq/cordon/client"
)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	url := os.Getenv("CORDON_API_URL")
	cordon, err := client.New(client.Options{APIURL: url, SandboxURL: url, APIKey: os.Getenv("CORDON_API_KEY")})
	if err != nil {
		return err
	}
	sandbox, err := cordon.Create(ctx, client.CreateOptions{})
	if err != nil {
		return err
	}
	defer sandbox.Kill(ctx)
	if err := show(ctx, sandbox, "before", "example.com"); err != nil {
		return err
	}

	// When the call returns the new rules are in force. Connections that they do
	// not allow are cut, also those that are open.
	rules := client.Network{DenyOut: []string{client.AllTraffic}, AllowOut: []string{"api.github.com"}}
	if err := sandbox.SetNetwork(ctx, rules); err != nil {
		return err
	}

	if err := show(ctx, sandbox, "after", "example.com"); err != nil {
		return err
	}
	return show(ctx, sandbox, "still allowed", "api.github.com")
}

// show prints the status of a host's page as the sandbox sees it.
func show(ctx context.Context, sandbox *client.Sandbox, when, host string) error {
	result, err := sandbox.Commands.Run(ctx, "curl -s -o /dev/null -w '%{http_code}' https://"+host, client.RunOptions{})
	if err != nil {
		return err
	}
	if result.ExitCode != 0 {
		result.Stdout = "refused"
	}
	fmt.Printf("%s: %s\n", when, result.Stdout)
	return nil
}
