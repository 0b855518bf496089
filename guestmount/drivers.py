"""The names under which Kubernetes knows the plugin: of volumes of nodes, and of those on NFS."""

NODES, NFS = "csi.runvol.io", "nfs.csi.runvol.io"
DRIVERS = (NODES, NFS)
