//go:build tools

// Package runc names the program that is built: a runtime with idmapped mounts, which Debian's is not.
package runc

import _ "github.com/opencontainers/runc"
