package gvisor

import (
	"debug/elf"
	"errors"
	"fmt"
)

// errDynamic is why a program that needs a dynamic loader cannot run sandboxes.
var errDynamic = errors.New("this program is linked dynamically, and a sandbox's process starts where no libraries are: build it with CGO_ENABLED=0, as make build does")

// checkLinked fails for a program that needs a dynamic loader: gVisor executes it once
// more in an empty root, where there is none, and all that is seen of that is that the
// process ended.
func checkLinked(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("read how the program is linked: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errDynamic
		}
	}
	return nil
}
