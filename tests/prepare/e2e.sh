#!/bin/sh
# Builds the storage part of Kubernetes' own end-to-end tests into the cache: the suite, ginkgo, which runs it in several
# processes, and agnhost, which the tests' pods are made of. About four minutes after cluster.sh, ten from nothing.
# Versions stand in tests/cluster/programs/e2e/go.mod, and nowhere else.
set -eu
cd "$(dirname "$0")/../.."

cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
module=$PWD/tests/cluster/programs/e2e
version=$(sed -n 's/^require k8s.io\/kubernetes \(v.*\)$/\1/p' "$module/go.mod")
sources=$(cat "$module/go.mod" "$module/go.sum" "$module"/*.go | sha256sum | cut -d' ' -f1)
place="$cache/bin/e2e-$version"

mkdir -p "$cache/bin" "$cache/build"
exec 9> "$cache/e2e.lock"
flock 9
if [ "$(cat "$place/.sources" 2>/dev/null)" = "$sources" ]; then
    exit 0
fi
go=$(command -v go || true)
[ -x .venv/bin/go ] && go=$PWD/.venv/bin/go
[ -n "$go" ] || { echo "e2e.sh: no Go; run tests/prepare/go.sh first" >&2; exit 1; }
echo "==> Kubernetes' end-to-end tests of storage $version (about ten minutes from nothing)"
part="$cache/build/e2e"
rm -rf "$part"
mkdir -p "$part"
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
built=k8s.io/component-base/version
flags="-s -w -X $built.gitVersion=$version"
(cd "$module" && "$go" build -trimpath -ldflags "$flags" -o "$part/" github.com/onsi/ginkgo/v2/ginkgo k8s.io/kubernetes/test/images/agnhost)
(cd "$module" && "$go" test -c -vet=off -trimpath -ldflags "$flags" -o "$part/suite.test" .)
echo "$sources" > "$part/.sources"
rm -rf "$place"
mv "$part" "$place"
