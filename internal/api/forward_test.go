package api_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/api"
)

func TestATunnelEndsWithItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := make(chan string, 1)
		b := newBench(t, func(c *api.Config) {
			c.Forward = func(_ http.ResponseWriter, r *http.Request, id string, port uint16) error {
				began <- id
				<-r.Context().Done()
				return nil
			}
		})
		id := b.create(`{}`)
		req := httptest.NewRequestWithContext(t.Context(), "GET", "/sandboxes/"+id+"/forward/5432", nil)
		req.Header.Set("X-API-KEY", b.user)
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.handler.ServeHTTP(httptest.NewRecorder(), req)
		}()
		if got := <-began; got != id {
			t.Fatalf("a tunnel to %s", got)
		}
		time.Sleep(time.Minute)
		select {
		case <-done:
			t.Fatal("the tunnel ended although its key is valid")
		default:
		}
		if err := b.keys.DeleteKey(t.Context(), b.userID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(16 * time.Second)
		select {
		case <-done:
		default:
			t.Fatal("the tunnel goes on after its key was revoked")
		}
	})
}
