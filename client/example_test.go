package client_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/cordonhq/cordon/client"
)

// A sandbox that may reach one domain and nothing else.
func Example() {
	ctx := context.Background()
	c, err := client.New(client.Options{APIURL: "http://127.0.0.1:3000", APIKey: os.Getenv("CORDON_API_KEY")})
	if err != nil {
		log.Fatal(err)
	}
	sb, err := c.Create(ctx, client.CreateOptions{
		Network: client.Network{
			AllowOut: []string{"example.com"},
			DenyOut:  []string{client.AllTraffic},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer sb.Kill(ctx)

	result, err := sb.Commands.Run(ctx, "curl -sS https://example.com", client.RunOptions{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.ExitCode, result.Stdout)

	events, err := sb.Events(ctx, client.EventOptions{})
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range events {
		fmt.Println(e.Verdict, e.Name, e.Rule.Id)
	}
}
