#!/bin/sh
# The first process of the user-mode kernel. Its root is the machine's own, live and writable, through hostfs: whatever
# may be written is covered first, then the root is made read-only, and nothing runs unless that holds.
# Jobs are paths of scripts, one a line, on the console; each leaves NAME.out and NAME.rc beside itself.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH DM_DISABLE_UDEV=1 LC_ALL=C PYTHONDONTWRITEBYTECODE=1 HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
for covered in /run /tmp /var/lib /var/log /var/tmp /var/cache /mnt /media /srv /opt /etc/lvm /etc/containerd; do
    [ -d "$covered" ] && mount -t tmpfs tmpfs "$covered"
done
# The machine may have no /lib/modules to put this kernel's into, so modprobe is told another place.
mkdir -p /run/kernel/lib/modules
ln -s /usr/lib/uml/modules/"$(uname -r)" /run/kernel/lib/modules/"$(uname -r)"
printf '#!/bin/sh\nexec modprobe -d /run/kernel "$@"\n' > /run/kernel/modprobe
chmod +x /run/kernel/modprobe
echo /run/kernel/modprobe > /proc/sys/kernel/modprobe
for word in $(cat /proc/cmdline); do
    case "$word" in
        jobs=*) jobs=${word#jobs=} ;;
        probe=*) probe=${word#probe=} ;;
        keep=*) keep=${word#keep=} ;;
    esac
done
mkdir -p /run/lock /run/jobs /mnt/jobs /var/lib/containerd
mount -t hostfs none /mnt/jobs -o "$jobs"
# What the tests read may itself lie below a covered directory (a checkout in /tmp, a Python in /opt).
for kept in $(echo "$keep" | tr : ' '); do
    [ -e "$kept" ] && continue
    mkdir -p "$kept"
    mount -t hostfs -o "ro,$kept" none "$kept"
done
mount -o remount,ro /
if (: > "$probe") 2>/dev/null; then
    echo "the machine's own files can still be written; stopping" > /mnt/jobs/refused
    halt -f
fi
mount -t tmpfs tmpfs /sys/fs/cgroup 2>/dev/null
umount /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control 2>/dev/null
done
ip link set lo up
hostname user-mode-kernel
for module in quota_v2 dm_mod dm_thin_pool dm_flakey dm_delay dm_log_writes dm_verity loop; do /run/kernel/modprobe -q "$module"; done
[ -e /dev/mapper/control ] || { mkdir -p /dev/mapper; mknod /dev/mapper/control c 10 236; }
: > /mnt/jobs/ready
stty -echo < /dev/console
while read -r job; do
    [ "$job" = halt ] && break
    ( cd /mnt/jobs && sh "/mnt/jobs/$job" > "/mnt/jobs/$job.out" 2>&1; echo $? > "/mnt/jobs/$job.tmp"; mv "/mnt/jobs/$job.tmp" "/mnt/jobs/$job.rc" ) &
done < /dev/console
halt -f
