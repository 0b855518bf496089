#!/bin/sh
# Makes .venv with the package (its stubs generated) and the development tools; quick when nothing has changed.
set -eu
cd "$(dirname "$0")/../.."

python=""
for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "python.sh: needs Python 3.11 or later with venv" >&2; exit 1; }

stamp=.venv/.stamp
inputs="pyproject.toml setup.py proto/*.proto tests/prepare/python.sh"
# shellcheck disable=SC2086
now=$(cat $inputs | sha256sum | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" = "$now" ] && [ -f runvol_proto/csi_pb2.py ]; then
    exit 0
fi
echo "==> Python environment in .venv"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check -e '.[dev]'
echo "$now" > $stamp
