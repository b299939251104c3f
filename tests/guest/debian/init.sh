#!/bin/sh
# /init in front of a system on a disk: makes the disk reachable and starts the system there. The
# kernel command line names the disk (root=/dev/...) and may say rw.

export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev 2>/dev/null
for module in /modules/*.ko; do
    insmod "$module" || echo "cannot load $module"
done

disk=$(sed -n 's/.*root=\([^ ]*\).*/\1/p' /proc/cmdline)
mode=ro
grep -q -w rw /proc/cmdline && mode=rw
tries=0
while [ ! -b "$disk" ] && [ $tries -lt 500 ]; do
    usleep 20000
    tries=$((tries + 1))
done
mkdir /system
if mount -t ext4 -o $mode "$disk" /system; then
    mount -o move /dev /system/dev
    umount /sys
    umount /proc
    exec switch_root /system /sbin/init
fi
echo "no system on $disk"
poweroff -f
