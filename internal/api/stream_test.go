package api_test

import (
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
)

func TestAStreamEndsWithItsSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		id := b.create(`{}`)
		b.flows.Record(flow(id, "a.com", flowlog.Allowed))
		req := httptest.NewRequestWithContext(t.Context(), "GET", "/sandboxes/"+id+"/network/events?follow=true", nil)
		req.Header.Set("X-API-KEY", b.user)
		rec := httptest.NewRecorder()
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.handler.ServeHTTP(rec, req)
		}()
		time.Sleep(40 * time.Second)
		b.do("DELETE", "/sandboxes/"+id, "")
		time.Sleep(15 * time.Second)
		select {
		case <-done:
		default:
			t.Fatal("the stream goes on after the sandbox")
		}
		got := rec.Body.String()
		if strings.Count(got, ": pulse\n\n") != 2 || strings.Count(got, "event: flow\n") != 1 || !strings.HasSuffix(got, "event: end\ndata: {}\n\n") {
			t.Fatalf("the stream was:\n%s", got)
		}
	})
}
