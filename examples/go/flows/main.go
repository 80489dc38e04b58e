// Command flows shows what a sandbox tried to reach and which rule decided.
//
// It prints:
//
//	deny dns example.org by dns
package main

import (
	"cmp"
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
		DenyOut: []string{client.AllTraffic}, AllowOut: []string{"example.com"},
	}})
	if err != nil {
		return err
	}
	defer sandbox.Kill(ctx)
	for _, host := range []string{"example.com", "example.org"} {
		if _, err := sandbox.Commands.Run(ctx, "curl -s https://"+host, client.RunOptions{}); err != nil {
			return err
		}
	}

	// "cordon flows <id>" prints the same. Without Verdict it has what was allowed as
	// well; sandbox.Follow goes on with what comes.
	events, err := sandbox.Events(ctx, client.EventOptions{Verdict: client.Denied})
	if err != nil {
		return err
	}
	for _, e := range events {
		fmt.Println(e.Verdict, e.Protocol, cmp.Or(e.Name, e.Destination), "by", e.Rule.Id)
	}
	return nil
}
