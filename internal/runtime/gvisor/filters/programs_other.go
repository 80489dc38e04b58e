//go:build !amd64

package filters

import "gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"

// Without a generated file for an architecture, gVisor compiles at each start.

func sentryProgram() precompiledseccomp.Program { return precompiledseccomp.Program{} }
func goferProgram() precompiledseccomp.Program  { return precompiledseccomp.Program{} }
