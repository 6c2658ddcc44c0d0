# A server without a screen, whose boot waits for nothing. No unit is masked.
systemctl set-default multi-user.target

# Nobody can log in on a console: there is no password. The generator would start one on ttyS0.
mkdir -p /etc/systemd/system-generators
ln -sf /dev/null /etc/systemd/system-generators/systemd-getty-generator

for unit in \
    getty@tty1.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    fstrim.timer e2scrub_all.timer e2scrub_reap.service \
    systemd-pstore.service
do
    template=${unit%%@*}@.service
    if [ -e "/lib/systemd/system/$unit" ] || [ -e "/lib/systemd/system/$template" ]; then
        systemctl disable "$unit"
    fi
done
