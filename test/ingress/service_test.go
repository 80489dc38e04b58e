package ingress_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// servicePath is where the service lies in a sandbox. Started under this name the
// test program is the service.
const servicePath = "/home/user/ingress-service"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != filepath.Base(servicePath) {
		os.Exit(m.Run())
	}
	if err := serve(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serve is the service: it answers on every address, under a name.
func serve(name string, addrs []string) error {
	ended := make(chan error, len(addrs))
	for _, addr := range addrs {
		network := "tcp4"
		if host, _, err := net.SplitHostPort(addr); err == nil && net.ParseIP(host).To4() == nil {
			network = "tcp6"
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		s := &http.Server{Handler: service(name, addr), ReadHeaderTimeout: 10 * time.Second}
		go func() { ended <- s.Serve(l) }()
	}
	fmt.Println("ready")
	return <-ended
}

func service(name, addr string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "%s at %s", name, addr) })
	mux.HandleFunc("GET /hold", func(w http.ResponseWriter, r *http.Request) { // until the client leaves
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush() // a client that left is noticed below
		<-r.Context().Done()
	})
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) { // a line every so often, for ever
		for range time.Tick(20 * time.Millisecond) {
			_, err := fmt.Fprintln(w, name)
			if err := errors.Join(err, http.NewResponseController(w).Flush(), r.Context().Err()); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", r.FormValue("n"))
		_, _ = io.CopyN(w, zeros{}, n) // the client counts
	})
	mux.HandleFunc("POST /count", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, n, err)
	})
	return mux
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
