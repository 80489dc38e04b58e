// Command create-and-run creates a sandbox, writes a file into it and runs a program.
//
// It prints:
//
//	hello from the sandbox
//	exit code 3
package main

import (
	"context"
	"fmt"
	"log"
	"os"
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
	// The address and the key of the server.
	url := os.Getenv("CORDON_API_URL")
	cordon, err := client.New(client.Options{APIURL: url, SandboxURL: url, APIKey: os.Getenv("CORDON_API_KEY")})
	if err != nil {
		return err
	}
	// The sandbox ends by itself after Timeout.
	sandbox, err := cordon.Create(ctx, client.CreateOptions{Timeout: time.Minute})
	if err != nil {
		return err
	}
	defer sandbox.Kill(ctx) // everything in it is gone

	program := strings.NewReader(`print("hello from the sandbox")`)
	if err := sandbox.Files.Write(ctx, "/home/user/hello.py", program); err != nil {
		return err
	}
	result, err := sandbox.Commands.Run(ctx, "python3 hello.py", client.RunOptions{})
	if err != nil {
		return err
	}
	fmt.Print(result.Stdout)

	// A command that fails is a result like any other.
	result, err = sandbox.Commands.Run(ctx, "exit 3", client.RunOptions{})
	if err != nil {
		return err
	}
	fmt.Println("exit code", result.ExitCode)
	return nil
}
