package main

import _ "unsafe" // for go:linkname

// procStatFile is what the store engine's process statistics are read from,
// once a second from package initialisation on, used or not.
//
//go:linkname procStatFile github.com/nats-io/nats-server/v2/server/pse.procStatFile
var procStatFile string

// stopSampling ends the engine's sampling before its second sample. This binary
// is also gVisor's sentry, whose seccomp filter kills a process that opens a
// file. A path with a NUL is refused before any system call is made, and the
// sampler gives up at the first error.
func stopSampling() { procStatFile = "\x00" }
