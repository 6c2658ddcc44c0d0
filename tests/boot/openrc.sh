# No terminal that would be waited for, and a service that says when it was stopped.
sed -i '/getty/s/^[^#]/#&/' /etc/inittab
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
