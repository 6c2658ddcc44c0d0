# Runs in a machine of the base. The agent has set up disks, clock and network before runit starts.
mkdir -p /etc/runit/runsvdir/default
ln -sfn /etc/sv/sshd /etc/runit/runsvdir/default/sshd

# Nobody can log in on a console: there is no password.
rm -f /etc/runit/runsvdir/default/agetty-*

# Not locked ("!"), since sshd then refuses keys as well.
usermod --shell /bin/bash --password '*' root
