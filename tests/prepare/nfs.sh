#!/bin/sh
# Unpacks the NFS servers that the tests need (the kernel's tools and nfs-ganesha) into the cache. They are not installed:
# Debian's packages would start servers on this machine.
set -eu
cache=${RUNVOL_CACHE:-$HOME/.cache/runvol}
wanted="nfs-kernel-server nfs-common nfs-ganesha nfs-ganesha-vfs rpcbind"
place="$cache/nfs/$(. /etc/os-release && echo "$ID-${VERSION_ID:-0}")"
[ -e "$place/.whole" ] && exit 0
echo "==> NFS servers, unpacked into $place"
new="$place.new"
rm -rf "$new" "$place"
mkdir -p "$new"
# What an installation would bring, without doing it.
# shellcheck disable=SC2086
packages=$(apt-get install -s -q --no-install-recommends $wanted | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
for package in $wanted; do
    case " $(echo $packages) " in *" $package "*) ;; *) packages="$packages $package" ;; esac
done
cd "$new"
# shellcheck disable=SC2086
apt-get download -q $packages >/dev/null
for package in *.deb; do
    dpkg -x "$package" .
    rm "$package"
done
: > .whole
mv "$new" "$place"
