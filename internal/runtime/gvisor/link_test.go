package gvisor

import (
	"errors"
	"testing"
)

func TestADynamicallyLinkedProgramIsRefused(t *testing.T) {
	if err := checkLinked("/bin/bash"); !errors.Is(err, errDynamic) {
		t.Errorf("a program with a loader: %v", err)
	}
	if err := checkLinked("/proc/self/exe"); err != nil {
		t.Errorf("this program: %v", err)
	}
}
