# Docker starts with the first client that asks for it: a boot does not pay for it. Containers with
# a restart policy come back at that moment too.
systemctl disable docker.service containerd.service
systemctl enable docker.socket
