package conntrack

import (
	"errors"
	"net"
	"os"
	"testing"
)

func TestATrackerConnectsAgainAfterAnError(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_PRIVILEGED") != "" {
			t.Fatal("this test needs root, and REQUIRE_PRIVILEGED is set")
		}
		t.Skip("this test needs root")
	}
	var tr Tracker
	mark := Mark{Value: 0xfedcba98, Mask: 0xffffffff} // no flow has it
	if _, err := tr.Flows(mark); err != nil {
		t.Fatal(err)
	}
	if err := tr.conn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Flows(mark); err == nil {
		t.Error("a broken connection gives no error")
	}
	if _, err := tr.Flows(mark); err != nil {
		t.Errorf("after an error: %v", err)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if _, err := tr.Flows(mark); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
