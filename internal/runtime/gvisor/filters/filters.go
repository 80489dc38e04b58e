// Package filters gives a sandbox's processes their seccomp filters without compiling
// them at each start, which would take 65 of 140 ms: the
// programs are compiled once by internal/runtime/gvisor/gen, are committed
// here, and are put into gVisor's table, which its Go module ships empty.
package filters

//go:generate go run ../gen .

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	bootfilter "gvisor.dev/gvisor/runsc/boot/filter"
	goferfilter "gvisor.dev/gvisor/runsc/fsgofer/filter"

	_ "unsafe" // for go:linkname

	_ "gvisor.dev/gvisor/pkg/sentry/platform/systrap" // registers the platform that is looked up
)

// sentryTable is where gVisor looks for a sentry's filters; it has no function to add one.
//
//go:linkname sentryTable gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var sentryTable map[string]precompiledseccomp.Program

// goferTable is the same of a gofer's filters.
//
//go:linkname goferTable gvisor.dev/gvisor/runsc/fsgofer/filter.precompiledPrograms
var goferTable map[string]precompiledseccomp.Program

// SentryOptions are the filter options of a sentry as cordon runs it: systrap,
// gVisor's own network stack, files opened by the sentry itself.
func SentryOptions() (bootfilter.Options, error) {
	constructor, err := platform.Lookup("systrap")
	if err != nil {
		return bootfilter.Options{}, fmt.Errorf("look up platform systrap: %w", err)
	}
	infos := constructor.PrecompiledSeccompInfo()
	if len(infos) != 1 {
		return bootfilter.Options{}, fmt.Errorf("platform systrap has %d filter variants, want 1", len(infos))
	}
	return bootfilter.Options{Platform: infos[0], HostFilesystem: true}, nil
}

// GoferOptions are the filter options of a gofer as cordon runs it.
func GoferOptions() goferfilter.Options { return goferfilter.Options{DirectFS: true} }

// RegisterSentry makes the sentry's program known to this process.
func RegisterSentry() {
	bootfilter.ListPrecompiled() // spends the Once that would empty the table
	p := sentryProgram()
	sentryTable = map[string]precompiledseccomp.Program{p.Name: p}
}

// RegisterGofer makes the gofer's program known to this process.
func RegisterGofer() {
	goferfilter.ListPrecompiled()
	p := goferProgram()
	goferTable = map[string]precompiledseccomp.Program{p.Name: p}
}
