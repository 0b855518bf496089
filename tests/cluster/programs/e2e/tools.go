//go:build tools

// Package suite names what is built from this module's versions besides the suite itself.
package suite

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
