# No terminal that would be waited for, none of Debian's own services (each is a minute of shells
# under emulation, the agent has done their work), and one that says when it was stopped.
sed -i '/getty/s/^[^#]/#&/' /etc/inittab
rm -f /etc/runlevels/*/*
find /etc/init.d -type f ! -name rc ! -name rcS ! -name functions.sh -delete
cat > /etc/init.d/witness <<'END'
#!/sbin/openrc-run
command=/bin/sleep
command_args="infinity"
command_background=true
pidfile=/run/witness.pid
stop_post() {
    echo stopped >> /root/witness
}
END
chmod 755 /etc/init.d/witness
rc-update add witness default
