# Docker starts with the machine, or, where systemd listens for it, with the first client that asks:
# a boot does not pay for it then. Containers with a restart policy come back at that moment too.
if [ -e /lib/systemd/system/docker.socket ] || [ -e /usr/lib/systemd/system/docker.socket ]; then
    systemctl disable docker.service containerd.service
    systemctl enable docker.socket
elif command -v systemctl >/dev/null; then
    systemctl enable docker.service
elif command -v rc-update >/dev/null; then
    rc-update add docker default
elif [ -d /etc/runit/runsvdir/default ]; then
    ln -sfn /etc/sv/docker /etc/runit/runsvdir/default/docker
fi
