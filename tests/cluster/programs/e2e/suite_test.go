// The storage part of Kubernetes' own end-to-end tests, for drivers that files describe: `go test -c` makes the program.
package suite

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"

	"k8s.io/kubernetes/test/e2e"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	"k8s.io/kubernetes/test/utils/image"

	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"
	_ "k8s.io/kubernetes/test/e2e/framework/metrics/init"
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
	_ "k8s.io/kubernetes/test/e2e/storage/external"
	_ "k8s.io/kubernetes/test/utils/format"
)

func TestMain(m *testing.M) {
	images := flag.Bool("images", false, "print the images that pods of the tests have, as JSON, and end")
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	if *images {
		names := map[string]string{
			"busybox": image.GetE2EImage(image.BusyBox),
			"agnhost": image.GetE2EImage(image.Agnhost),
			"glibc":   image.GetE2EImage(image.GlibcDnsTesting),
			"nginx":   image.GetE2EImage(image.Nginx),
			"pause":   image.GetE2EImage(image.Pause),
		}
		if err := json.NewEncoder(os.Stdout).Encode(names); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	framework.AfterReadingAllFlags(&framework.TestContext)
	// Where driver files say that the files of their classes are.
	testfiles.AddFileSource(testfiles.RootFileSource{Root: framework.TestContext.RepoRoot})
	os.Exit(m.Run())
}

func TestE2E(t *testing.T) {
	e2e.RunE2ETests(t)
}
