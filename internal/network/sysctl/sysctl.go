// Package sysctl reads and writes kernel parameters of the network namespace the
// process is in. It hides /proc/sys.
package sysctl

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

const dir = "/proc/sys/"

// Write sets a parameter. Its key is its path below /proc/sys, as in net/ipv4/ip_forward.
func Write(key, value string) error {
	if err := os.WriteFile(dir+key, []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", Dotted(key), value, err)
	}
	return nil
}

// Read returns a parameter without the line's end.
func Read(key string) (string, error) {
	b, err := os.ReadFile(dir + key)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", Dotted(key), err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Number reads a parameter that is one number.
func Number(key string) (uint64, error) {
	text, err := Read(key)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", Dotted(key), err)
	}
	return v, nil
}

// Exists reports whether the kernel has a parameter, or a directory of them.
func Exists(key string) bool {
	_, err := os.Stat(dir + key)
	return err == nil
}

// Dotted is a key as sysctl(8) writes it: net.ipv4.ip_forward.
func Dotted(key string) string { return strings.ReplaceAll(key, "/", ".") }
