package tlsconf

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/share"
)

// Limits of orders for custom domains. Let's Encrypt takes 300 orders in three
// hours from one account (its documentation, "Rate Limits"), and five failures an
// hour of one name.
const (
	orderPlaces   = 10
	orderPlace    = 10 * time.Minute // how long an order takes up a place, so that there are ten in any ten minutes
	orderQueue    = 16               // orders of one owner that wait for a place
	placeWait     = time.Minute      // how long each waits
	noPlaceWait   = 15 * time.Second // after an order that was not made for want of one
	firstBackoff  = time.Minute
	lastBackoff   = 6 * time.Hour
	orderTime     = placeWait + 2*time.Minute
	orderPatience = 9 * time.Second // of a handshake, which as a whole has ten
)

// orders are the certificates of custom domains that were asked for.
type orders struct {
	places *share.Gate
	wg     sync.WaitGroup

	mu     sync.Mutex // guards byName
	byName map[string]*order
}

// order is one name's.
type order struct {
	done    chan struct{} // closed when no attempt is under way
	cancel  context.CancelFunc
	err     error // of the last attempt
	backoff time.Duration
	next    time.Time // not before
	served  bool      // its certificate is in memory
}

func newOrders() orders {
	return orders{places: share.NewGate(share.Certificates.Of(orderPlaces, 0), orderQueue, placeWait), byName: map[string]*order{}}
}

// Pools counts the orders of custom domains and what was refused, for metrics.
func (a *ACME) Pools() []*share.Pool { return []*share.Pool{a.orders.places.Pool()} }

// place waits until one more may be ordered for an owner. The names of an owner, however
// many, leave places for those of others, and where several wait they get them in turn.
func (o *orders) place(ctx context.Context, owner string) error {
	leave, err := o.places.Enter(ctx, owner, "")
	if full := (*share.Full)(nil); errors.As(err, &full) {
		return fmt.Errorf("%w: %w", errTooMany, err)
	}
	if err != nil {
		return err
	}
	time.AfterFunc(orderPlace, leave)
	return nil
}

func (o *orders) wait() { o.wg.Wait() }

// failed ends the attempt for a name: the library would go on for a month.
func (o *orders) failed(name string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if ord := o.byName[name]; ord != nil && ord.cancel != nil {
		ord.err = err
		ord.cancel()
	}
}

// forget drops the names that are not allowed any more and returns them.
func (o *orders) forget(allow func(string) bool) (gone []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, ord := range o.byName {
		if !allow(name) && !ord.busy() {
			delete(o.byName, name)
			gone = append(gone, name)
		}
	}
	return gone
}

func (ord *order) busy() bool {
	select {
	case <-ord.done:
		return false
	default:
		return true
	}
}

// getCustom returns the certificate of a custom domain, and orders it when there is
// none. The handshake waits for the order as long as it may; the order goes on
// without it.
func (a *ACME) getCustom(name string, hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if !a.cfg.Allow(name) {
		return nil, fmt.Errorf("no certificate: %s is not bound to a sandbox", name)
	}
	if len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == tlsALPN {
		return a.custom.GetCertificate(hello)
	}
	ord, err := a.order(name)
	if err != nil {
		return nil, err
	}
	patience := time.NewTimer(orderPatience)
	defer patience.Stop()
	select {
	case <-ord.done:
	case <-patience.C:
		return nil, fmt.Errorf("certificate for %s is being ordered", name)
	case <-hello.Context().Done():
		return nil, hello.Context().Err()
	}
	return a.custom.GetCertificate(hello)
}

// order returns the name's order, made now if it may be.
func (a *ACME) order(name string) (*order, error) {
	o := &a.orders
	o.mu.Lock()
	defer o.mu.Unlock()
	ord := o.byName[name]
	now := time.Now()
	switch {
	case ord == nil:
		ord = &order{}
	case ord.busy() || ord.served:
		return ord, nil
	case now.Before(ord.next):
		return nil, fmt.Errorf("certificate for %s is ordered again in %s: %w", name, ord.next.Sub(now).Round(time.Second), ord.err)
	}
	if a.ctx.Err() != nil {
		return nil, a.ctx.Err()
	}
	var ctx context.Context
	ctx, ord.cancel = context.WithTimeout(a.ctx, orderTime)
	ord.done, ord.err = make(chan struct{}), nil
	o.byName[name] = ord
	o.wg.Go(func() { a.attempt(ctx, name, ord) })
	return ord, nil
}

// attempt gets the certificate from the folder or the CA.
func (a *ACME) attempt(ctx context.Context, name string, ord *order) {
	err := a.obtain(ctx, name)
	o := &a.orders
	o.mu.Lock()
	defer o.mu.Unlock()
	ord.cancel()
	ord.cancel = nil
	close(ord.done)
	if err == nil {
		ord.served, ord.backoff = true, 0
		return
	}
	if ord.err == nil { // not told by event
		ord.err = err
		a.log.Warn("certificate not ordered", "host", name, "err", err)
	}
	if errors.Is(err, errTooMany) { // the CA was not asked, and has not refused
		ord.next = time.Now().Add(noPlaceWait)
		return
	}
	ord.backoff = min(max(2*ord.backoff, firstBackoff), lastBackoff)
	ord.next = time.Now().Add(ord.backoff)
}

func (a *ACME) obtain(ctx context.Context, name string) error {
	cert, err := a.custom.CacheManagedCertificate(ctx, name)
	switch {
	case err == nil && !cert.Expired():
		return nil // due for renewal or not: the cache's watch sees to that
	case err == nil:
		if err := a.orders.place(ctx, a.cfg.Owner(name)); err != nil {
			return err
		}
		if err := a.custom.RenewCertAsync(ctx, name, false); err != nil {
			return err
		}
		a.cache.Remove([]string{cert.Hash()})
	case errors.Is(err, fs.ErrNotExist):
		if err := a.orders.place(ctx, a.cfg.Owner(name)); err != nil {
			return err
		}
		if err := a.custom.ObtainCertAsync(ctx, name); err != nil {
			return err
		}
	default:
		return fmt.Errorf("read stored certificate: %w", err)
	}
	_, err = a.custom.CacheManagedCertificate(ctx, name)
	return err
}

var errTooMany = fmt.Errorf("no certificate is ordered for a custom domain: there may be %d in %s", orderPlaces, orderPlace)
