// Package lab proves.
package lab

//go:linkname unexplained runtime.unexplained
func unexplained()
