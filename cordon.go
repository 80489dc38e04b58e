// Package cordon is the root of the module; the code is in cmd, client and
// internal. ARCHITECTURE.md is the map.
package cordon
