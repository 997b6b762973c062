#!/bin/sh
# Install what a Debian or Ubuntu machine needs to build and test Trireme. Does nothing where all of it is there.
set -eu

packages="containernetworking-plugins dnsmasq-base musl-tools nftables iptables conntrack tcpdump iperf3 iproute2 procps \
gcc libc6-dev binutils python3-venv python3-dev libnetfilter-queue-dev libnfnetlink-dev"

missing=""
for package in $packages; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "Missing packages:$missing. Run as root, or install them first: apt-get install$missing" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
apt-get install -y -qq --no-install-recommends $missing >/dev/null
