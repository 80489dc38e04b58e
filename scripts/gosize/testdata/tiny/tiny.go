// Package tiny is counted.
package tiny

import (
	_ "unsafe" // for go:linkname
)

/* A comment
over two lines. */

// nanotime is the clock that the scheduler reads: time.Now reads two.
//
//go:linkname nanotime runtime.nanotime
func nanotime() int64

type pair[K comparable, V any] struct {
	key   K // a comment beside code
	value V
}

func (p *pair[K, V]) swap(q *pair[K, V]) {
	*p, *q = *q, *p
}

func (p pair[K, V]) text() string {
	return `two
lines`
}

type one struct{}

func (one) method() {}
