package main

import (
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestANameHasOneServer(t *testing.T) {
	name := "test-" + strings.ToLower(t.Name()) + time.Now().Format("150405.000000000")
	first, err := holdName(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := holdName(t.Context(), name); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), name) {
		t.Errorf("a second server: %v, want a conflict that names %s", err, name)
	}
	time.AfterFunc(nameWait/4, func() { first.Close() })
	second, err := holdName(t.Context(), name)
	if err != nil {
		t.Fatalf("the first one's end was not waited for: %v", err)
	}
	second.Close()
}
