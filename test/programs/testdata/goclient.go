// Command goclient is Go's resolver or its HTTP client: goclient lookup NAME, goclient get URL.
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if os.Args[1] == "lookup" {
		_, err := net.DefaultResolver.LookupHost(ctx, os.Args[2])
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, os.Args[2], http.NoBody)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	fmt.Println(res.Status)
	if res.StatusCode != http.StatusOK {
		os.Exit(1)
	}
	return nil
}
