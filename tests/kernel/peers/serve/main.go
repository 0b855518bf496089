// Serves one of containerd's own snapshotters, directly, on a socket of its own: the peers of a benchmark.
//
//	serve SOCKET ROOT overlayfs
//	serve SOCKET ROOT devmapper POOL SIZE FSTYPE
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/devmapper"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: serve SOCKET ROOT overlayfs|devmapper [POOL SIZE FSTYPE]")
	}
	peer, err := open(args[1], args[2], args[3:])
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", args[0])
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(peer))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	return server.Serve(listener)
}

func open(root, kind string, rest []string) (snapshots.Snapshotter, error) {
	if kind == "overlayfs" {
		return overlay.NewSnapshotter(root)
	}
	if kind != "devmapper" || len(rest) != 3 {
		return nil, fmt.Errorf("%s is no peer, or its arguments are missing", kind)
	}
	file := filepath.Join(root, "devmapper.toml")
	text := fmt.Sprintf("root_path = %q\npool_name = %q\nbase_image_size = %q\nfs_type = %q\n", root, rest[0], rest[1], rest[2])
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	config, err := devmapper.LoadConfig(file)
	if err != nil {
		return nil, err
	}
	return devmapper.NewSnapshotter(context.Background(), config)
}
