// Command open-a-port starts a web server in a sandbox and opens it from outside. Then does
// the same with a port that asks for a token.
//
// It prints:
//
//	https://3000-…
//	public: 200
//	private, without the token: 403
//	private, with the token: 200
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

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
	if _, err := sandbox.Commands.Start(ctx, "python3 -m http.server 3000", client.RunOptions{}); err != nil {
		return err
	}
	// Every port of a sandbox has a URL of its own. Open it in a browser, too.
	fmt.Println("https://" + sandbox.Host(3000))
	status, err := get(ctx, sandbox, "")
	if err != nil {
		return err
	}
	fmt.Println("public:", status)

	no := false
	secret, err := cordon.Create(ctx, client.CreateOptions{Network: client.Network{AllowPublicTraffic: &no}})
	if err != nil {
		return err
	}
	defer secret.Kill(ctx)
	if _, err := secret.Commands.Start(ctx, "python3 -m http.server 3000", client.RunOptions{}); err != nil {
		return err
	}
	if status, err = get(ctx, secret, ""); err != nil {
		return err
	}
	fmt.Println("private, without the token:", status)
	if status, err = get(ctx, secret, secret.TrafficToken); err != nil {
		return err
	}
	fmt.Println("private, with the token:", status)
	return nil
}

// get opens port 3000 as any program on the internet would.
func get(ctx context.Context, sandbox *client.Sandbox, token string) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+sandbox.Host(3000), nil)
	if err != nil {
		return 0, err
	}
	if token != "" {
		req.Header.Set("E2b-Traffic-Access-Token", token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	return res.StatusCode, nil
}
