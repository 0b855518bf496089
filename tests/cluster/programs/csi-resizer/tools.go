//go:build tools

// Package tools names the programs that are built from this module's versions.
package tools

import (
	_ "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer"
)
