#!/bin/sh
# /init of the guests that the tests and the demo boot: a stock kernel and busybox.
#
# The kernel command line says what to do, for example
#     anemone.steps=uname,disk,irqs,poweroff
# Steps run in order. What happens is told on the console in lines that begin with "guest:";
# a step that finds something wrong says "guest: FAIL ..." and powers the guest off.

export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev 2>/dev/null
# Kernel messages below "error" would cut our lines in two.
echo 4 > /proc/sys/kernel/printk
for module in /modules/*.ko; do
    insmod "$module" 2>/dev/null || echo "guest: cannot load $module"
done

# virtio_console may take a moment to appear after its module is loaded.
console=/dev/console
if grep -q console=hvc0 /proc/cmdline; then
    console=/dev/hvc0
    tries=0
    while [ ! -c $console ] && [ $tries -lt 50 ]; do
        usleep 20000
        tries=$((tries + 1))
    done
fi
exec < $console > $console 2>&1

say() { echo "guest: $*"; }

fail() {
    say "FAIL $*"
    sync
    poweroff -f
    sleep 60
}

option() { sed -n "s/.*anemone\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

# The host has put random bytes and their SHA-256 on the disk, and looks for what we write.
step_disk() {
    mkdir -p /disk
    mount -t ext4 /dev/vda /disk || fail "cannot mount /dev/vda"
    (cd /disk && sha256sum -c payload.sha256 > /dev/null) || fail "payload differs"
    say "payload verified"
    { cat /disk/token; uname -r; } > /disk/written-by-guest || fail "cannot write"
    cp /disk/payload /disk/copy || fail "cannot copy"
    umount /disk || fail "cannot unmount"
    say "disk written"
}

# No timer, keyboard, clock or interrupt controller of a PC.
step_irqs() {
    sed 's/^/guest: irq /' /proc/interrupts
    if grep -E 'XT-PIC|i8042|rtc|timer$|parport|floppy|IO-APIC +0-edge' /proc/interrupts; then
        fail "a legacy device has an interrupt"
    fi
    say "no legacy interrupt"
}

step_copy() {
    dd if=/dev/vda of=/dev/vdb bs=64k conv=fsync 2>/dev/null || fail "cannot copy vda to vdb"
    say "copied $(sha256sum < /dev/vda | cut -c 1-64)"
}

# Requests as large as the disk lets its driver make them, from and to memory that lies together: the
# first half of the disk goes to the second.
step_large() {
    queue=/sys/block/vda/queue
    cat $queue/max_hw_sectors_kb > $queue/max_sectors_kb || fail "cannot ask for large requests"
    echo always > /sys/kernel/mm/transparent_hugepage/enabled || fail "no large pages"
    set -- $(cat /sys/block/vda/stat)
    requests=$(($1 + $5))
    sectors=$(($3 + $7))
    dd if=/dev/vda of=/dev/vda bs=32M count=1 seek=1 iflag=direct oflag=direct conv=fsync 2>/dev/null ||
        fail "cannot copy"
    set -- $(cat /sys/block/vda/stat)
    each=$((($3 + $7 - sectors) / ($1 + $5 - requests) / 2))
    [ $each -gt 2048 ] || fail "the driver makes requests of $each KiB"
    say "copied in requests of $each KiB"
}

step_readonly() {
    [ "$(cat /sys/block/vda/ro)" = 1 ] || fail "vda is not read-only"
    if dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null; then
        fail "a write to a read-only disk has succeeded"
    fi
    say "write refused"
}

# Fills 1.5 GiB, then numbers it every 64 MiB and reads the numbers back, when the last of them is
# there: no part of memory is another one's twin.
step_fill() {
    mkdir -p /fill
    mount -t tmpfs -o size=1600m none /fill || fail "cannot mount a tmpfs"
    dd if=/dev/zero of=/fill/file bs=1M count=1536 2>/dev/null || fail "no 1536 MiB of memory"
    part=0
    while [ $part -lt 24 ]; do
        printf "%04d" $part | dd of=/fill/file bs=64M seek=$part conv=notrunc 2>/dev/null
        part=$((part + 1))
    done
    while [ $part -gt 0 ]; do
        part=$((part - 1))
        found=$(dd if=/fill/file bs=4 skip=$((part * 16777216)) count=1 2>/dev/null)
        [ "$found" = "$(printf "%04d" $part)" ] || fail "part $part of memory holds $found"
    done
    umount /fill
    say "filled 1536 MiB"
}

# Counts boots on the disk; ends the guest the second time.
step_boots() {
    mkdir -p /disk
    mount -t ext4 /dev/vda /disk || fail "cannot mount /dev/vda"
    boots=$(($(cat /disk/boots 2>/dev/null || echo 0) + 1))
    echo $boots > /disk/boots
    umount /disk
    say "boot number $boots"
    [ $boots -lt 2 ] && reboot -f || poweroff -f
    sleep 60
}

step_rng() {
    dd if=/dev/hwrng of=/random bs=64 count=1 iflag=fullblock 2>/dev/null
    [ "$(wc -c < /random)" = 64 ] || fail "no random bytes"
    say "random bytes from $(cat /sys/class/misc/hw_random/rng_current)"
    say "random bytes $(hexdump -v -e '1/1 "%02x"' /random)"
}

free_mib() { awk '/MemFree/ { print int($2 / 1024) }' /proc/meminfo; }

# The balloon has taken most of the memory; what is used for files is given up for it. Then the guest
# needs more than is left, and takes it back before it kills a program.
step_balloon() {
    tries=0
    while [ "$(free_mib)" -gt 160 ] && [ $tries -lt 600 ]; do
        usleep 100000
        tries=$((tries + 1))
    done
    say "ballooned $(free_mib) MiB free"
    read -r _
    mkdir -p /fill
    mount -t tmpfs -o size=300m none /fill || fail "cannot mount a tmpfs"
    dd if=/dev/zero of=/fill/file bs=1M count=260 2>/dev/null || fail "no 260 MiB of memory"
    say "deflated"
    read -r _
}

# A large file comes, and goes: the host gets its memory back.
step_report() {
    mkdir -p /fill
    mount -t tmpfs -o size=400m none /fill || fail "cannot mount a tmpfs"
    dd if=/dev/zero of=/fill/file bs=1M count=300 2>/dev/null || fail "no 300 MiB of memory"
    say "filled"
    read -r _
    rm /fill/file
    say "dropped"
    read -r _
    umount /fill
}

wait_for_pmem() {
    tries=0
    while [ ! -b /dev/pmem0 ] && [ $tries -lt 100 ]; do
        usleep 20000
        tries=$((tries + 1))
    done
    [ -b /dev/pmem0 ] || fail "there is no /dev/pmem0"
}

# The disk's file system, in persistent memory: its files are mapped in place, also those whose code
# runs, and the page cache has no part in it.
step_pmem() {
    wait_for_pmem
    mkdir -p /pmem
    mount -t ext4 -o dax /dev/pmem0 /pmem || fail "cannot mount /dev/pmem0"
    grep -q ' /pmem ext4 [^ ]*dax=always' /proc/mounts || fail "not mounted with DAX"
    (cd /pmem && sha256sum -c payload.sha256 > /dev/null) || fail "payload differs"
    mkdir /pmem/bin || fail "cannot write"
    cp /bin/busybox /pmem/bin || fail "cannot copy"
    sum=$(chroot /pmem /bin/busybox sha256sum payload) || fail "cannot run a program"
    [ "$sum" = "$(cat /pmem/payload.sha256)" ] || fail "a program in place says $sum"
    say "programs run in place"
    { cat /pmem/token; uname -r; } > /pmem/written-by-guest || fail "cannot write"
    cp /pmem/payload /pmem/copy || fail "cannot copy"
    sync
    umount /pmem || fail "cannot unmount"
    say "pmem written"
}

# What is written to read-only persistent memory is dropped.
step_pmemro() {
    wait_for_pmem
    before=$(sha256sum < /dev/pmem0)
    dd if=/dev/urandom of=/dev/pmem0 bs=4096 count=4 conv=fsync 2>/dev/null
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(sha256sum < /dev/pmem0)" = "$before" ] || fail "read-only memory has changed"
    say "pmem unchanged"
}

# Reads persistent memory until something happens to it.
step_pmemread() {
    wait_for_pmem
    say "reading"
    while :; do
        echo 3 > /proc/sys/vm/drop_caches
        dd if=/dev/pmem0 of=/dev/null bs=1M 2>/dev/null || say "cannot read"
        usleep 100000
    done
}

# Asks for an address.
step_lease() {
    say "card $(cat /sys/class/net/eth0/address) mtu $(cat /sys/class/net/eth0/mtu)"
    cat > /tmp/lease << 'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "$router" > /tmp/router
END
    chmod 755 /tmp/lease
    ip link set lo up
    ip link set eth0 up || fail "no network card"
    udhcpc -i eth0 -n -q -t 10 -s /tmp/lease > /dev/null 2>&1 || fail "no address"
    say "address $(ip -4 -o addr show eth0 | awk '{ print $4 }')"
}

# An address that the host has chosen, the router's, and that of the other side.
step_static() {
    option address | tr , '\n' > /tmp/addresses
    { read -r address && read -r router && read -r peer; } < /tmp/addresses
    ip link set lo up
    ip link set eth0 up || fail "no network card"
    ip addr add "$address" dev eth0 && ip route add default via "$router" || fail "address $address"
    echo "$peer" > /tmp/router
}

# Fetches a file of a server on the host's loopback, which the gateway's address leads to.
step_net() {
    step_lease
    wget -q -O /tmp/fetched "http://$(cat /tmp/router):$(option fetch)/payload" || fail "cannot fetch"
    say "fetched $(wc -c < /tmp/fetched) $(sha256sum < /tmp/fetched | cut -c 1-64)"
}

# Fetches the same again and again: every byte arrives, whatever happens to the card meanwhile.
step_pull() {
    sum=$(sha256sum < /tmp/fetched)
    say "pulling"
    turn=0
    while [ $turn -lt 20 ]; do
        wget -q -O /tmp/pulled "http://$(cat /tmp/router):$(option fetch)/payload" || fail "pull $turn"
        [ "$(sha256sum < /tmp/pulled)" = "$sum" ] || fail "pull $turn is damaged"
        turn=$((turn + 1))
    done
    say "pulled $turn times"
}

# A connection that is lost is tried again, until one goes through.
step_retry() {
    say "retrying"
    tries=1
    until timeout 10 wget -q -O /tmp/pulled "http://$(cat /tmp/router):$(option fetch)/slow"; do
        tries=$((tries + 1))
        [ $tries -lt 60 ] || fail "no connection goes through"
        sleep 1
    done
    [ "$(sha256sum < /tmp/pulled)" = "$(sha256sum < /tmp/fetched)" ] || fail "damaged"
    say "went through with try $tries"
}

# Serves what was fetched.
step_serve() {
    httpd -p 80 -h /tmp || fail "cannot serve"
    say "serving"
}

# Sockets to the host and back; the program says what it does.
step_vsock() {
    anemone-guest-vsock "$(option vsock)" "$(option peer)" || fail "vsock"
}

client() {
    program=$1
    shift
    /clients/lib64/ld-linux-x86-64.so.2 --library-path /clients/lib "/clients/bin/$program" "$@"
}

mount_clients() {
    mkdir -p /clients
    mount -t virtiofs clients /clients || fail "cannot mount the programs"
}

# Bytes to a server on the other side, and from it.
step_iperf() {
    mount_clients
    say "iperf to the other side: $(iperf)"
    say "iperf from the other side: $(iperf --reverse)"
}

iperf() {
    client iperf3 --json --bytes "$(option amount)" --client "$(cat /tmp/router)" \
        --port "$(option iperf)" "$@" > /tmp/iperf
    awk -F '[:,]' '/"sum_received"/ { found = 1 }
        /"error"/ { print; exit }
        found && /"bytes"/ { bytes = $2 }
        found && /"bits_per_second"/ { printf "%d bytes, %d Mbit/s", bytes, $2 / 1e6; exit }' /tmp/iperf
}

# Serves, until a line is typed.
step_iperfserve() {
    [ -d /clients ] || mount_clients
    client iperf3 --server > /dev/null &
    tries=0
    until grep -q ":1451 .* 0A " /proc/net/tcp /proc/net/tcp6 || [ $tries -gt 300 ]; do
        usleep 100000
        tries=$((tries + 1))
    done
    say "iperf listens"
    read -r _
}

# Every device at work at the same time, each verified, until the host types a line. What the steps of
# the devices do comes first, then rounds of functions all_NAME.
step_all() {
    # What is typed would appear in the middle of a line.
    stty -echo
    mount_clients
    say "the serial port works" > /dev/ttyS0
    workers=
    for device in disks share pmem rng net; do
        all_rounds $device &
        workers="$workers $!"
    done
    step_vsock &
    workers="$workers $!"
    say "all devices work"
    read -r _
    : > /stop
    for worker in $workers; do
        wait $worker || fail "a device does not work"
    done
    umount /clients
    say "all devices verified:$(cat /rounds.*)"
}

all_rounds() {
    case $1 in
        disks) step_copy ;;
        share) step_fs && mount_share ;;
        pmem) step_pmem ;;
        rng) step_rng ;;
    esac
    rounds=0
    until [ -e /stop ] && [ $rounds -gt 0 ]; do
        all_$1 || fail "round $rounds of $1"
        rounds=$((rounds + 1))
    done
    echo -n " $rounds of $1" > /rounds.$1
}

# Reads past the guest's cache what was written by the copy.
all_disks() {
    dd if=/dev/vdb of=/dev/vdb bs=64k iflag=direct oflag=direct conv=notrunc 2> /dev/null || return 1
    dd if=/dev/vda bs=64k iflag=direct 2> /dev/null | sha256sum > /tmp/vda
    dd if=/dev/vdb bs=64k iflag=direct 2> /dev/null | sha256sum > /tmp/vdb
    cmp /tmp/vda /tmp/vdb
}

# A tree is made, found after the guest has forgotten it, and removed: by names that are all known before
# the first file goes, because tmpfs of Linux before 6.6, which the host may have there, finds its place in
# a directory again by counting entries.
all_share() {
    mkdir /share/round && cp -r /copy/tree /share/round || return 1
    echo 3 > /proc/sys/vm/drop_caches
    (cd /share/round && sha256sum -c /sums > /dev/null) || return 1
    find /share/round ! -type d > /tmp/files && find /share/round -depth -type d > /tmp/folders
    xargs rm < /tmp/files && xargs rmdir < /tmp/folders
}

# Random bytes through the memory itself, and back after another mount.
all_pmem() {
    mount -t ext4 -o dax /dev/pmem0 /pmem || return 1
    dd if=/dev/urandom bs=64k count=8 2> /dev/null | tee /pmem/round | sha256sum > /tmp/round
    umount /pmem && mount -t ext4 -o dax /dev/pmem0 /pmem || return 1
    sha256sum < /pmem/round | cmp - /tmp/round || return 1
    rm /pmem/round && umount /pmem
}

all_rng() {
    dd if=/dev/hwrng of=/tmp/block bs=64 count=16 iflag=fullblock 2> /dev/null || return 1
    [ "$(wc -c < /tmp/block)" = 1024 ] || return 1
    ! cmp -s /tmp/block /tmp/block.last || return 1
    mv /tmp/block /tmp/block.last
}

# From the host's loopback, with a program that lies in a directory of the host.
all_net() {
    url="http://$(cat /tmp/router):$(option fetch)/payload"
    client curl --silent --show-error --fail --max-time 60 -o /tmp/curled "$url" || return 1
    cmp /tmp/curled /tmp/fetched
}

# Verified work for one device, until the host types a line. The device's process is killed over and
# over meanwhile. Each load is a function that works until /stop is there and writes to /rounds how
# often it has found everything right.
step_load() {
    device=$(option load)
    # What is typed would appear in the middle of a line.
    stty -echo
    : > /rounds
    "load_$device" &
    worker=$!
    say "load runs"
    read -r _
    : > /stop
    wait $worker || fail "the load of $device has found an error"
    say "load verified, $(cat /rounds) rounds"
}

# fio in a place of its own: blocks are written over and over, some of them read back meanwhile, and all
# of them at the end of each round. It comes with its libraries in persistent memory.
run_fio() {
    wait_for_pmem
    mkdir -p /tools
    mount -t ext4 -o ro,dax /dev/pmem0 /tools || return 1
    fio_rounds=0
    while [ ! -e /stop ]; do
        /tools/lib64/ld-linux-x86-64.so.2 --library-path /tools/lib /tools/bin/fio \
            --name=load --rw=randrw --rwmixwrite=70 --bs=4k --fsync=16 --norandommap \
            --serialize_overlap=1 --randrepeat=0 --randseed=$((fio_rounds + 1)) \
            --verify=crc32c --verify_async=0 --verify_fatal=1 --verify_backlog=64 --do_verify=1 \
            --thread --eta=never --minimal "$@" > /fio 2>&1 || {
            say "FAIL fio: $(grep -v '^3;' /fio | head -5 | tr '\n' ' ')"
            return 1
        }
        fio_rounds=$((fio_rounds + 1))
        echo $fio_rounds > /fio-rounds
    done
    say "fio verified, $fio_rounds rounds"
}

# Random bytes go to one of four places; what lies at another one is read back from the disk. fio has
# the second half of it.
load_blk() {
    run_fio --filename=/dev/vda --ioengine=libaio --iodepth=8 --direct=1 --offset=2m --size=1m --io_size=4m &
    fio=$!
    rounds=0
    while [ ! -e /stop ]; do
        # Flushes are what takes long in one of the two, writes in the other.
        case $((rounds % 2)) in
            0) echo "write through" > /sys/block/vda/cache_type ;;
            1) echo "write back" > /sys/block/vda/cache_type ;;
        esac || { say "FAIL the cache type stays"; return 1; }
        place=$((rounds % 4))
        dd if=/dev/urandom of=/load bs=64k count=8 2> /dev/null
        sha256sum < /load > /sum.$place
        dd if=/load of=/dev/vda bs=64k seek=$((place * 8)) conv=fsync 2> /dev/null || return 1
        echo 3 > /proc/sys/vm/drop_caches
        other=$(((rounds + 1) % 4))
        if [ -e /sum.$other ]; then
            dd if=/dev/vda bs=64k skip=$((other * 8)) count=8 2> /dev/null | sha256sum > /found
            cmp -s /found /sum.$other || { say "FAIL round $rounds: place $other differs"; return 1; }
        fi
        rounds=$((rounds + 1))
        echo $rounds > /rounds
    done
    wait $fio
}

mount_share() {
    mkdir -p /share
    mount -t virtiofs share /share || fail "cannot mount the share"
}

# What programs do with files, on a directory of the host.
step_fs() {
    mount_share
    (cd /share && sha256sum -c payload.sha256 > /dev/null) || fail "payload differs"
    mkdir -p /share/tree/deep || fail "cannot make directories"
    cp /bin/busybox /share/tree/deep || fail "cannot copy"
    sum=$(/share/tree/deep/busybox sha256sum < /share/payload) || fail "cannot run a program"
    [ "${sum%% *}" = "$(cut -d ' ' -f 1 /share/payload.sha256)" ] || fail "a program in the share says $sum"
    ln -s deep/busybox /share/tree/link && ln /share/payload /share/tree/hard || fail "cannot link"
    [ "$(readlink /share/tree/link)" = deep/busybox ] || fail "wrong symbolic link"
    mv /share/tree/deep /share/tree/moved || fail "cannot rename"
    for number in $(seq 200); do echo $number > /share/tree/file.$number; done
    [ $(ls /share/tree | wc -l) = 203 ] || fail "the directory has $(ls /share/tree | wc -l) entries"
    rm /share/tree/file.1?? || fail "cannot remove"
    exec 7> /share/gone && rm /share/gone && echo text >&7 || fail "cannot write an unlinked file"
    exec 7>&-
    chmod 640 /share/tree/file.7 || fail "cannot change a mode"
    mkdir /copy && tar -C /share -c tree | tar -C /copy -x || fail "cannot archive"
    (cd /copy && find tree -type f | sort | xargs sha256sum) > /sums
    umount /share || fail "cannot unmount"
    mount_share
    (cd /share && sha256sum -c /sums > /dev/null) || fail "the copy differs"
    cp /sums /share/sums && sync && umount /share || fail "cannot finish"
    say "share written"
}

step_fsro() {
    mount_share
    (cd /share && sha256sum -c payload.sha256 > /dev/null) || fail "payload differs"
    echo text 2> /dev/null > /share/new && fail "a file was made"
    rm /share/payload 2> /dev/null && fail "a file was removed"
    umount /share
    say "share unchanged"
}

# Trees are made, moved, compared with what was put into them, and removed. Each file goes away once.
# fio has files of its own.
load_fs() {
    mount_share
    mkdir /share/fio
    run_fio --directory=/share/fio --ioengine=psync --direct=1 --numjobs=2 --size=256k --io_size=512k &
    fio=$!
    rounds=0
    while [ ! -e /stop ]; do
        mkdir /share/work || return 1
        dd if=/dev/urandom of=/load bs=16k count=4 2> /dev/null
        for number in 1 2 3 4 5 6 7 8; do
            cp /load /share/work/$number && echo $rounds >> /share/work/$number || return 1
        done
        echo $rounds >> /load
        echo $rounds >> /share/appended || return 1
        mv /share/work /share/done || return 1
        echo 3 > /proc/sys/vm/drop_caches
        for number in 1 2 3 4 5 6 7 8; do
            cmp /load /share/done/$number || { say "FAIL round $rounds: file $number differs"; return 1; }
            rm /share/done/$number || return 1
        done
        rmdir /share/done || return 1
        rounds=$((rounds + 1))
        echo $rounds > /rounds
    done
    seq 0 $((rounds - 1)) | cmp - /share/appended || { say "FAIL the appended lines differ"; return 1; }
    wait $fio && umount /share
}

# Blocks that are whole and never the same.
load_rng() {
    rounds=0
    last=none
    while [ ! -e /stop ]; do
        dd if=/dev/hwrng of=/block bs=64 count=16 iflag=fullblock 2> /dev/null || return 1
        [ "$(wc -c < /block)" = 1024 ] || { say "FAIL a block is too short"; return 1; }
        sum=$(sha256sum < /block)
        [ "$sum" != "$last" ] || { say "FAIL the same bytes twice"; return 1; }
        last=$sum
        rounds=$((rounds + 1))
        echo $rounds > /rounds
    done
}

# Lines with numbers; the host looks whether each has come once and in its place.
load_console() {
    rounds=0
    while [ ! -e /stop ]; do
        rounds=$((rounds + 1))
        say "line $rounds"
        echo $rounds > /rounds
        usleep 1000
    done
}

load_vsock() { anemone-guest-load vsock; }

load_net() {
    step_static
    anemone-guest-load net "$(cat /tmp/router):$(option port)"
}

load_pmem() {
    wait_for_pmem
    anemone-guest-load pmem /dev/pmem0
}

load_balloon() { anemone-guest-load memory; }

# Waits until a line is typed.
step_pause() {
    say "waits for a line"
    read -r line
    say "was told $line"
}

# A shell, with the disk's files if there is a disk.
step_shell() {
    if [ -b /dev/vda ] && mkdir -p /disk && mount -t ext4 /dev/vda /disk; then
        say "/dev/vda is mounted on /disk"
    fi
    say "shell"
    setsid -c sh -i
    umount /disk 2> /dev/null
}

# Waits until someone presses the power button.
step_button() {
    for input in /sys/class/input/input*; do
        if [ "$(cat "$input/name")" = "Power Button" ]; then
            event=$(basename "$input"/event*)
            say "waiting for the power button"
            # One struct input_event.
            dd if=/dev/input/"$event" bs=24 count=1 > /dev/null 2>&1
            say "power button pressed"
            return
        fi
    done
    fail "no power button"
}

say "steps $(option steps)"
for step in $(option steps | tr , ' '); do
    case $step in
        uname) say "kernel $(uname -r)" ;;
        cpus) say "cpus $(nproc)" ;;
        cpuinfo) say "cpu $(sed -n 's/^model name[^:]*: //p; s/^flags[^:]*:/ has/p' /proc/cpuinfo | tr -d '\n')" ;;
        memory) say "memory $(awk '/MemTotal/ { print $2 }' /proc/meminfo) KiB" ;;
        panic) say "panic now"; sleep 1; echo c > /proc/sysrq-trigger ;;
        hold) say "holding"; while :; do sleep 1000; done ;;
        reboot) say "reboot now"; reboot -f ;;
        poweroff) say "done"; poweroff -f ;;
        disk | irqs | copy | large | readonly | fill | boots | rng | net | pull | retry | serve | button | shell | pmem | pmemro | pmemread | balloon | report | vsock | fs | fsro | load | pause | all | lease | static | iperf | iperfserve) "step_$step" ;;
        *) fail "unknown step $step" ;;
    esac
done
say "done"
poweroff -f
sleep 60
