#!/bin/bash
# github.com/nats-io/nats-server/v2 v2.15.2, github.com/nats-io/nats.go v1.55.0 (jetstream)
#
# A key-value bucket with LimitMarkerTTL. A key is created with KeyTTL(2s), as a lease is, and then renewed with
# Update, the call that compares revisions.
# Guess: the key keeps its time to live and is gone two seconds after the renewal, or Update refuses.
# Seen:  Update succeeds and the key has no time to live any more: it is there after six seconds, and stays. A
#        key that was not updated is gone.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >go.mod <<'M'
module finding

go 1.26

require (
	github.com/nats-io/nats-server/v2 v2.15.2
	github.com/nats-io/nats.go v1.55.0
)
M
cat >main.go <<'G'
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func main() {
	s, err := server.NewServer(&server.Options{JetStream: true, StoreDir: os.Args[1], DontListen: true, NoSigs: true})
	check(err)
	s.Start()
	defer s.Shutdown()
	if !s.ReadyForConnections(10 * time.Second) {
		check(errors.New("the server does not start"))
	}
	nc, err := nats.Connect("", nats.InProcessServer(s))
	check(err)
	js, err := jetstream.New(nc)
	check(err)
	ctx := context.Background()
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "leases", LimitMarkerTTL: time.Second})
	check(err)
	_, err = kv.Create(ctx, "left-alone", []byte("a"), jetstream.KeyTTL(2*time.Second))
	check(err)
	revision, err := kv.Create(ctx, "renewed", []byte("a"), jetstream.KeyTTL(2*time.Second))
	check(err)
	_, err = kv.Update(ctx, "renewed", []byte("b"), revision)
	check(err)
	time.Sleep(6 * time.Second)
	_, alone := kv.Get(ctx, "left-alone")
	_, renewed := kv.Get(ctx, "renewed")
	fmt.Printf("after six seconds: left alone: %v; updated once: %v\n", alone, renewed)
	if alone == nil || renewed != nil {
		fmt.Fprintln(os.Stderr, "changed")
		os.Exit(1)
	}
}
G
go mod tidy >/dev/null 2>&1
go run . "$dir/store"
