#!/bin/sh
# Installs the Debian packages that are missing, and says which. Usage: debian.sh SET...
# Sets: run (what runvol itself needs), test (what the tests and the demo need), kernel (what the tests need that run in
# a kernel with device-mapper), image (what makes the image, and the cluster of the tests), watch (a Prometheus that
# scrapes, and promtool).
set -eu

run="e2fsprogs xfsprogs util-linux python3-venv thin-provisioning-tools"
test="qemu-system-x86 fio busybox-static cpio kmod python3-minimal libpython3-stdlib make git ca-certificates gcc libc6-dev"
kernel="user-mode-linux dmsetup lvm2 runc qemu-utils strace iproute2 fdisk checkpolicy"
image="mmdebstrap openssl"
watch="prometheus"
grep -q '^VERSION_ID="12"' /etc/os-release || test="$test virtiofsd"

wanted=""
for set in "$@"; do
    case "$set" in
        run) wanted="$wanted $run" ;;
        test) wanted="$wanted $test" ;;
        kernel) wanted="$wanted $kernel" ;;
        image) wanted="$wanted $image" ;;
        watch) wanted="$wanted $watch" ;;
        *) echo "debian.sh: no set called '$set'; there are run, test, kernel, image and watch" >&2; exit 2 ;;
    esac
done

missing=""
for package in $wanted; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing="$missing $package"
done
have_kernel=$(ls -d "${RUNVOL_CACHE:-$HOME/.cache/runvol}"/kernels/linux-image-* 2>/dev/null || true)
case " $* " in *" test "*) need_kernel=yes ;; *) need_kernel= ;; esac
if [ -z "$missing" ] && { [ -z "$need_kernel" ] || [ -n "$have_kernel" ] || apt-cache depends linux-image-amd64 >/dev/null 2>&1; }; then
    exit 0
fi

as_root=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "debian.sh: needs root or sudo to install:$missing" >&2; exit 1; }
    as_root=sudo
fi
echo "==> Debian packages:${missing:- (refreshing the package lists)}"
$as_root apt-get update -q >/dev/null
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >/dev/null
fi
