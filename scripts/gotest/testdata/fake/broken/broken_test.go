package broken

import (
	"testing"

	"example.test/fake/count"
)

func TestBroken(t *testing.T) {
	count.Run(t)
	t.Error("it fails")
}
