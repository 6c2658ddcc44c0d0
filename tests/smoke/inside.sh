#!/bin/bash
# Runs as root in the nested host, from the payload disk: installs the project from its wheel the way
# its user would, and starts the loop that runs the scenarios. Everything it prints reaches the runner
# through the second serial port.
set -euo pipefail
exec 2>&1

step() { echo "@step $(cut -d' ' -f1 /proc/uptime) $*"; }

# as_owner COMMAND…: run it as the user whose banger this is.
as_owner() {
    setpriv --reuid dev --regid dev --init-groups \
        env -i HOME=/home/dev USER=dev LOGNAME=dev LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin "$@"
}

step "host is up"
modprobe kvm-amd
venv=/home/dev/.venv

install_banger() {
    step "installing the wheel"
    as_owner python3 -m venv --without-pip "$venv"
    # A pip from outside: putting one into the environment takes as long as a boot.
    as_owner PYTHONPATH=/payload/pip python3 -m pip --python "$venv/bin/python" --disable-pip-version-check \
        install --quiet --no-index --no-compile --find-links /payload/wheels banger-vm

    step "placing kernel, image and firecracker"
    install -d -o dev -g dev -m 0700 /var/lib/banger
    as_owner tar -C /var/lib/banger -xf /payload/state.tar
    install -m 0644 /payload/config.toml /etc/banger/config.toml

    step "banger system install"
    "$venv/bin/banger" system install --owner dev || {
        journalctl -q -o cat -u bangerd.service -u bangerd-root.service
        exit 1
    }
    as_owner /usr/local/bin/banger system status
}

if [ -e /usr/local/bin/banger ]; then
    step "the power was cut"
    systemctl start bangerd-root.service bangerd.service
else
    install_banger
fi

step "scenarios"
cd /payload
python3 -B -m tests.smoke.inside
