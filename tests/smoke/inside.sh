#!/bin/bash
# Runs as root in the nested host, from the payload disk: installs the project from its wheel and
# starts the scenarios. Everything it prints reaches the runner through the second serial port.
set -euo pipefail
exec 2>&1

step() { echo "@step $(cut -d' ' -f1 /proc/uptime) $*"; }

step "host is up"
modprobe kvm-amd
venv=/opt/banger
state=$XDG_STATE_HOME/banger

step "installing the wheel"
python3 -m venv --without-pip "$venv"
# The distribution's own pip, from outside: putting one into the environment takes as long as a boot.
pip=(/usr/share/python-wheels/pip-*.whl)
python3 "${pip[0]}/pip" --python "$venv/bin/python" --disable-pip-version-check \
    install --quiet --no-index --no-compile --root-user-action ignore \
    --find-links /payload/wheels banger-vm

step "placing kernel, image and firecracker"
mkdir -p "$state" /root/.config/banger
tar -C "$state" -xf /payload/state.tar
cp /payload/config.toml /root/.config/banger/config.toml

step "scenarios"
chosen=$(tr ' ' '\n' < /proc/cmdline | sed -n 's/^smoke\.scenarios=//p')
IFS=, read -r -a selected <<< "$chosen"
export BANGER=$venv/bin/banger
cd /payload
python3 -B -m tests.smoke.scenarios "${selected[@]}"
