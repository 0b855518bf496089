//go:build tools

// Package tools names the programs that are built from this module's versions.
package tools

import (
	_ "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"
)
