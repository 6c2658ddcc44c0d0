#!/bin/bash
# What an engine for containers does before it runs one, in a guest of the kernel release $1 that has
# everything built in. NFT is the command line of an nft; $2:$3 answers on the host, but only to the
# guest's own address. Ends with status 0 when all of it works.
set -euo pipefail

test "$(uname -r)" = "$1"
test ! -s /proc/modules
modprobe --all overlay veth bridge br_netfilter nf_nat tun fuse
test -c /dev/net/tun
test -c /dev/fuse

mkdir -p /root/layers/{low,up,work,all}
echo below > /root/layers/low/file
mount -t overlay overlay -o lowerdir=/root/layers/low,upperdir=/root/layers/up,workdir=/root/layers/work \
    /root/layers/all
echo above > /root/layers/all/file
test "$(cat /root/layers/low/file /root/layers/up/file)" = $'below\nabove'
umount /root/layers/all

unshare --user --map-root-user --mount --pid --fork --ipc --uts --net --cgroup --time true
grep -q '^Seccomp_filters:' /proc/self/status
mkdir -p /run/groups
mount -t cgroup2 none /run/groups
for controller in cpuset cpu io memory hugetlb pids; do
    grep -qw "$controller" /run/groups/cgroup.controllers
done
umount /run/groups

ip link add docker9 type bridge
ip addr add 10.99.0.1/24 dev docker9
ip link set docker9 up
ip netns add box
ip link add veth9 type veth peer name eth0 netns box
ip link set veth9 master docker9 up
ip -n box link set lo up
ip -n box addr add 10.99.0.2/24 dev eth0
ip -n box link set eth0 up
ip -n box route add default via 10.99.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
test -e /proc/sys/net/bridge/bridge-nf-call-iptables

reach() { ip netns exec box timeout "$1" bash -c "exec 3<> /dev/tcp/$2/$3" 2> /dev/null; }
# Nobody answers to the box's own address.
if reach 2 "$2" "$3"; then
    echo "the box reached the host without a rule" >&2
    exit 1
fi
$NFT -f - << 'RULES'
table ip box {
    chain post { type nat hook postrouting priority 100; ip saddr 10.99.0.0/24 oifname != "docker9" masquerade; }
    chain forward { type filter hook forward priority 0; ct state established,related accept; iifname "docker9" accept; }
}
RULES
reach 20 "$2" "$3"
