// Command only-these-hosts creates a sandbox that reaches two hosts and nothing else.
//
// It prints:
//
//	example.com: 200
//	api.github.com: 200
//	example.org: refused
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
	sandbox, err := cordon.Create(ctx, client.CreateOptions{Network: client.Network{
		DenyOut:  []string{client.AllTraffic},             // nothing at all ...
		AllowOut: []string{"example.com", "*.github.com"}, // ... but these names, on ports 80 and 443
	}})
	if err != nil {
		return err
	}
	defer sandbox.Kill(ctx)

	for _, host := range []string{"example.com", "api.github.com", "example.org"} {
		result, err := sandbox.Commands.Run(ctx, "curl -s -o /dev/null -w '%{http_code}' https://"+host, client.RunOptions{})
		if err != nil {
			return err
		}
		if result.ExitCode != 0 { // curl did not even get an address: other names are not resolved
			result.Stdout = "refused"
		}
		fmt.Printf("%s: %s\n", host, result.Stdout)
	}
	return nil
}
