#!/bin/sh
# What mmdebstrap's result lacks to be the smoke host. Runs in it, with this directory copied in.
set -eu
files=$(dirname "$0")

install -m 0755 "$files/overlay-root" /etc/initramfs-tools/scripts/init-bottom/overlay-root
install -m 0644 "$files/smoke.service" /etc/systemd/system/smoke.service
install -d /etc/systemd/system/multi-user.target.wants /payload
ln -sf ../smoke.service /etc/systemd/system/multi-user.target.wants/smoke.service

# Only what the root needs: unpacking a big initramfs is slow where the processor is emulated.
printf 'MODULES=list\nCOMPRESS=zstd\n' > /etc/initramfs-tools/conf.d/smoke
printf '%s\n' virtio_pci virtio_blk squashfs overlay ext4 > /etc/initramfs-tools/modules
update-initramfs -u -k all

# Services that the scenarios do not look at; systemd-resolved is one that they do.
for unit in getty@tty1.service serial-getty@ttyS0.service dnsmasq.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-networkd.service systemd-timesyncd.service \
    systemd-pstore.service systemd-update-utmp.service nftables.service \
    systemd-machine-id-commit.service systemd-binfmt.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
echo smoke-host > /etc/hostname
echo '127.0.0.1 localhost smoke-host' > /etc/hosts
: > /etc/fstab
# A fixed machine id spares systemd the first-boot presets.
echo 5b1e0d0f5d3d4a3f9f0a4d4a54b0c0de > /etc/machine-id
# The system's own lookup goes through systemd-resolved, as on a desktop.
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
# The user whose banger this is: no sudo, and the group that /dev/kvm has.
useradd -m -s /bin/bash -u 1000 -G kvm dev
# The runner inside works only where it finds this; no other host has it.
install -d /etc/banger
: > /etc/banger/smoke-host
# The journal in memory: it ends with the machine.
rm -rf /var/log/journal
rm -rf /usr/share/doc/* /usr/share/man/* /usr/share/locale/* \
    /var/lib/apt/lists/* /var/lib/dpkg/info /var/cache/apt/*.bin
rm -r "$files"
