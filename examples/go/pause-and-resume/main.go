// Command pause-and-resume pauses a sandbox with a program in it, and lets it go on later.
//
// It prints:
//
//	paused
//	the program counted on: true
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
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
	// A program that counts in its memory and writes the number down.
	counter := "n=0; while sleep 0.1; do n=$((n+1)); echo $n > /tmp/n; done"
	if _, err := sandbox.Commands.Start(ctx, counter, client.RunOptions{}); err != nil {
		return err
	}
	before, err := count(ctx, sandbox)
	if err != nil {
		return err
	}

	// Memory, files and processes go to disk. A paused sandbox uses no CPU and no memory.
	if err := sandbox.Pause(ctx); err != nil {
		return err
	}
	info, err := sandbox.Info(ctx)
	if err != nil {
		return err
	}
	fmt.Println(info.State)

	// Hours later, in another program: its ID is enough.
	again, err := cordon.Connect(ctx, sandbox.ID, 5*time.Minute)
	if err != nil {
		return err
	}
	after, err := count(ctx, again)
	if err != nil {
		return err
	}
	fmt.Println("the program counted on:", after > before)
	return nil
}

// count waits a second and reads the number.
func count(ctx context.Context, sandbox *client.Sandbox) (int, error) {
	result, err := sandbox.Commands.Run(ctx, "sleep 1; cat /tmp/n", client.RunOptions{})
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(result.Stdout))
}
