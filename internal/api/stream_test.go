package api_test

import (
	"context"
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

func TestAStreamEndsWithItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		id := b.create(`{}`)
		req := httptest.NewRequestWithContext(t.Context(), "GET", "/sandboxes/"+id+"/network/events?follow=true", nil)
		req.Header.Set("X-API-KEY", b.user)
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.handler.ServeHTTP(httptest.NewRecorder(), req)
		}()
		time.Sleep(time.Second)
		if err := b.keys.DeleteKey(t.Context(), b.userID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		select {
		case <-done:
		default:
			t.Fatal("the stream goes on after its key was revoked")
		}
	})
}

func TestOneKeyFollowsSoManyStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		id := b.create(`{}`)
		ctx, cancel := context.WithCancel(t.Context())
		follow := func(key string) *httptest.ResponseRecorder {
			req := httptest.NewRequestWithContext(ctx, "GET", "/sandboxes/"+id+"/network/events?follow=true", nil)
			req.Header.Set("X-API-KEY", key)
			rec := httptest.NewRecorder()
			go b.handler.ServeHTTP(rec, req)
			synctest.Wait()
			return rec
		}
		for i := range 64 {
			if rec := follow(b.user); rec.Code != 200 {
				t.Fatalf("stream %d: %d %s", i, rec.Code, rec.Body)
			}
		}
		if rec := follow(b.user); rec.Code != 429 || !strings.Contains(rec.Body.String(), "64 event streams") {
			t.Errorf("one more: %d %s", rec.Code, rec.Body)
		}
		if rec := follow(b.admin); rec.Code != 200 {
			t.Errorf("another key: %d %s", rec.Code, rec.Body)
		}
		cancel()
		synctest.Wait()
		ctx, cancel = context.WithCancel(t.Context())
		defer cancel()
		if rec := follow(b.user); rec.Code != 200 {
			t.Errorf("after the others ended: %d %s", rec.Code, rec.Body)
		}
	})
}
