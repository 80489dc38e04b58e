package sandbox

import "github.com/cordonhq/cordon/internal/errs"

// Allowance is how many sandboxes one owner may have. 0 is no limit but the server's.
type Allowance struct {
	Sandboxes int // that run
	Paused    int
}

// The limits of a sandbox's metadata and environment, in octets: it is kept in
// memory and written at every change.
const (
	maxMetadata      = 100 // pairs
	maxMetadataKey   = 256
	maxMetadataValue = 8 << 10
	maxMetadataTotal = 64 << 10
	maxEnv           = 1000 // variables
	maxEnvTotal      = 256 << 10
)

// ValidLabels checks the sizes of metadata and environment.
func ValidLabels(metadata, env map[string]string) error {
	if len(metadata) > maxMetadata {
		return errs.New(errs.Invalid, "metadata has %d pairs, it may have %d", len(metadata), maxMetadata)
	}
	total := 0
	for k, v := range metadata {
		if len(k) > maxMetadataKey || len(v) > maxMetadataValue {
			return errs.New(errs.Invalid, "metadata[%q] is %d bytes with a key of %d: a key may have %d, a value %d", k[:min(len(k), 64)], len(v), len(k), maxMetadataKey, maxMetadataValue)
		}
		total += len(k) + len(v)
	}
	if total > maxMetadataTotal {
		return errs.New(errs.Invalid, "metadata is %d bytes, it may have %d", total, maxMetadataTotal)
	}
	if len(env) > maxEnv {
		return errs.New(errs.Invalid, "envVars has %d variables, it may have %d", len(env), maxEnv)
	}
	total = 0
	for k, v := range env {
		total += len(k) + len(v)
	}
	if total > maxEnvTotal {
		return errs.New(errs.Invalid, "envVars is %d bytes, it may have %d: write files instead", total, maxEnvTotal)
	}
	return nil
}

// limited is the lower of two limits, of which 0 is none.
func limited(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
