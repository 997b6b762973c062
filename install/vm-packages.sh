#!/bin/sh
# Install what tests/vm/boot.py needs to boot Debian's own kernel in software emulation, and what only that kernel has
# a use for (IPVS).
set -eu

packages="qemu-system-x86 busybox-static cpio squashfs-tools ipvsadm ipset"
missing=""
for package in $packages; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
apt-get install -y -qq --no-install-recommends $missing >/dev/null
