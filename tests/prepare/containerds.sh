#!/bin/sh
# Puts older containerds into the cache, which tests ask what they make of a configuration, and run containers with:
# Debian 12's 1.6 (unpacked, not installed) and 1.7, built with what go.sh has found or fetched. Quick when they are there.
set -eu
cd "$(dirname "$0")/../.."

v16=1.6.20
v17=v1.7.33
programs="containerd ctr containerd-shim-runc-v2"
cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
mkdir -p "$cache/bin" "$cache/build"

# Whether a program is missing in a directory.
lacks() {
    for program in $programs; do
        [ -x "$1/$program" ] || return 0
    done
    return 1
}

place="$cache/bin/containerd-v$v16"
if lacks "$place"; then
    # Another Debian has another containerd; the tests then say that this one is not there.
    package=$(apt-cache madison containerd 2>/dev/null | sed -n "s/^ *containerd | \($v16[^ ]*\) .*/\1/p" | head -n 1)
    if [ -n "$package" ]; then
        echo "==> containerd $v16, unpacked into $place"
        new=$(mktemp -d "$cache/build/containerd-XXXXXX")
        if (cd "$new" && apt-get download -q "containerd=$package" >/dev/null 2>&1 && dpkg -x ./*.deb .); then
            mkdir -p "$place"
            for program in $programs; do
                mv "$new/usr/bin/$program" "$place/$program"
            done
        else
            echo "containerds.sh: containerd $package could not be fetched; its tests are skipped" >&2
        fi
        rm -rf "$new"
    fi
fi

place="$cache/bin/containerd-$v17"
if lacks "$place"; then
    go=$(command -v go || true)
    [ -x .venv/bin/go ] && go=$PWD/.venv/bin/go
    [ -n "$go" ] || { echo "containerds.sh: no Go; run tests/prepare/go.sh first" >&2; exit 1; }
    echo "==> containerd $v17 (about two minutes)"
    # Not `go install`: it takes no module that excludes others, as this one does.
    source=$("$go" mod download -json "github.com/containerd/containerd@$v17" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')
    mkdir -p "$place"
    for program in $programs; do
        (cd "$source" && CGO_ENABLED=0 GOFLAGS=-buildvcs=false "$go" build -trimpath -tags no_btrfs \
            -o "$cache/build/$program-$v17" -ldflags "-s -w -X github.com/containerd/containerd/version.Version=$v17" \
            "./cmd/$program")
        mv "$cache/build/$program-$v17" "$place/$program"
    done
fi
