package crash

import (
	"testing"

	"example.test/fake/count"
)

func TestCrash(t *testing.T) {
	if count.Run(t) == 0 {
		go panic("at first")
		select {}
	}
}

func TestAfter(t *testing.T) { count.Run(t) }
