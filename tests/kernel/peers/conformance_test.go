// Runs containerd's own snapshotter suite against a proxy snapshotter that listens on $RUNVOL_SOCKET.
package peers

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestSnapshotter(t *testing.T) {
	socket := os.Getenv("RUNVOL_SOCKET")
	if socket == "" {
		t.Fatal("RUNVOL_SOCKET names no socket")
	}
	testsuite.SnapshotterSuite(t, "runvol", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "runvol"), conn.Close, nil
	})
}
