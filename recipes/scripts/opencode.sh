# The program is optional: without it there is nothing to start.
if [ -x /usr/local/bin/opencode ]; then
    systemctl enable opencode.service
fi
