# SPDX-License-Identifier: Apache-2.0
"""Run a command on Debian's own kernel: `python tests/vm/boot.py [--timeout S] COMMAND...`.

The kernel comes from the package linux-image-amd64, unpacked into build/vm; qemu boots it in software emulation. The
guest's root is the host's: the same checkout and virtual environment, from a disk image with what is read most, else
through 9p, with a memory overlay on top. Nothing that the guest writes stays but what it leaves in the folder named by
$VM_RESULTS. Needs the packages that install/vm-packages.sh installs. Ends with the command's exit status.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from tests.vm.image import build_image, output, whole_trees  # noqa: E402 - found by the path of this program alone

WORK = CHECKOUT / "build" / "vm"
RESULTS = WORK / "results"
_GUEST_RESULTS = "/run/vm-results"
_BOOT_MODULES = ("virtio_pci", "virtio_blk", "squashfs", "9p", "9pnet_virtio", "overlay")
_KEPT_MODULES = (
    *("net/", "lib/", "crypto/", "arch/x86/crypto/", "drivers/virtio/", "drivers/block/virtio_blk.ko"),
    *(f"drivers/net/{name}.ko" for name in ("dummy", "ifb", "macvlan", "tap", "tun", "veth", "vrf", "vxlan")),
    *(f"drivers/net/{name}/" for name in ("bonding", "ipvlan")),
    *(f"fs/{name}/" for name in ("9p", "fscache", "netfs", "overlayfs", "squashfs")),
    *("drivers/char/hw_random/", "drivers/net/net_failover.ko"),
)
"""What the guest can use of the kernel's modules; to search the whole index takes it long."""
_PRELOADED_MODULES = (
    *(
        "crc32c_generic",
        "sctp",
        "bridge",
        "br_netfilter",
        "veth",
        "dummy",
        "sch_netem",
        "sch_ingress",
        "cls_matchall",
        "cls_u32",
    ),
    *("ip_vs", "ip_vs_rr", "xt_set", "ip_set_bitmap_port", "ip_set_hash_ip", "ip_set_hash_ipport"),
    *("ip_set_hash_ipportip", "nfnetlink_log"),
    *("nfnetlink_queue", "nf_conntrack_netlink", "nft_chain_nat", "nft_compat", "nft_ct", "nft_fib_inet", "nft_limit"),
    *("nft_masq", "nft_nat", "nft_numgen", "nft_queue", "nft_redir", "nft_reject_inet", "nft_dup_netdev"),
    *("xt_CT", "xt_MASQUERADE", "xt_NFQUEUE", "xt_REDIRECT", "xt_addrtype", "xt_comment", "xt_connmark"),
    *("xt_conntrack", "xt_length", "xt_mark", "xt_nat", "xt_statistic", "xt_tcpudp", "xt_u32"),
)
_MEMORY = "6G"
_CORES = "2"
_CPU = "max,-la57"
_KERNEL_ARGUMENTS = (
    # The check of the timer counts its ticks in a loop, which a loaded machine does not give it the time for.
    *("console=ttyS0", "panic=-1", "quiet", "loglevel=3", "random.trust_cpu=on", "no_timer_check"),
    # An emulated HPET is slow to read; the emulated TSC is the host's.
    *("tsc=reliable", "clocksource=tsc"),
    # What costs an emulated processor much and shows nothing here.
    *("mitigations=off", "init_on_alloc=0", "hardened_usercopy=off", "apparmor=0", "audit=0"),
    # Namespaces and rules come and go all the time; each waits for all processors otherwise.
    "rcupdate.rcu_expedited=1",
)
_NO_STATUS = 125
"""Exit status where the guest ended without one: it did not boot, or ran out of time."""

_INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /lower /image /upper /root
busybox mount -t proc proc /proc
busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t sysfs sysfs /sys
for module in {modules}; do busybox modprobe $module || echo "no module $module"; done
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro root /lower
busybox mount -t squashfs -o ro /dev/vda /image
busybox mount -t tmpfs -o size=2g tmpfs /upper
busybox mkdir -p /upper/data /upper/work
busybox mount -t overlay -o lowerdir=/image:/lower,upperdir=/upper/data,workdir=/upper/work overlay /root
for tree in {trees}; do busybox mount --bind /image$tree /root$tree; done
for place in proc sys; do busybox mount --move /$place /root/$place; done
busybox mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
busybox mount -t devtmpfs devtmpfs /root/dev
busybox mkdir -p /root/dev/pts /root/dev/shm
busybox mount -t devpts devpts /root/dev/pts
busybox mount -t tmpfs tmpfs /root/dev/shm
busybox mount -t tmpfs tmpfs /root/run
busybox mount -t tmpfs tmpfs /root/tmp
busybox mkdir -p /root{results}
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288 results /root{results}
busybox mkdir -p /root/lib/modules
busybox mount --bind /image{tree}/lib/modules /root/lib/modules
busybox cp /bin/busybox /root/run/busybox
busybox printf '#!/run/busybox sh\\nexec /run/busybox modprobe "$@"\\n' > /root/run/modprobe
busybox chmod 755 /root/run/modprobe
echo /run/modprobe > /root/proc/sys/kernel/modprobe
busybox ip link set lo up
busybox cp /stage2 /root/run/stage2
# The kernel looks for modprobe below the root that switch_root moves.
exec busybox switch_root /root /run/stage2
"""

_STAGE2 = """#!/run/busybox sh
/bin/bash {results}/guest.sh
echo $? > {results}/status
/run/busybox sync
/run/busybox poweroff -f
"""

_GUEST = """export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root VM_RESULTS={results}
export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
hostname guest
date -s @{now} >/dev/null
# Who asks for a module while another loads it would go on without it. Nothing happens where one is missing. SCTP asks
# for its checksum by a name that has no alias, so that comes first.
for module in {preloaded}; do /run/modprobe $module; done
cd {checkout} || exit 1
{command}
"""


def main() -> int:
    """Prepare what is missing, boot, and give the command's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=840.0, help="seconds until the guest is ended")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="run in the checkout by the guest's bash")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is needed")
    tree = unpack_kernel()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "status").unlink(missing_ok=True)
    script = _GUEST.format(
        results=_GUEST_RESULTS,
        now=int(time.time()),
        preloaded=" ".join(_PRELOADED_MODULES),
        checkout=CHECKOUT,
        command=" ".join(arguments.command),
    )
    (RESULTS / "guest.sh").write_text(script)
    initrd = build_initrd(tree)
    disk = WORK / "disk.squashfs"
    build_image(disk, CHECKOUT, tree / "lib" / "modules")
    boot(tree, initrd, disk, arguments.timeout)
    try:
        return int((RESULTS / "status").read_text())
    except (FileNotFoundError, ValueError):
        sys.stderr.write("vm: the guest left no exit status\n")
        return _NO_STATUS


def unpack_kernel() -> Path:
    """Unpack the newest kernel of linux-image-amd64 once, index what is kept of its modules; give the folder."""
    depends = output("apt-cache", "depends", "linux-image-amd64")
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        sys.exit("vm: apt knows no linux-image-amd64; run apt-get update")
    tree = WORK / found[1]
    if (tree / "pruned").exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", found[1]], cwd=tree, check=True)
    (package,) = tree.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
    package.unlink()
    (release,) = (tree / "lib" / "modules").iterdir()
    for module in release.rglob("*.ko"):
        if not str(module.relative_to(release / "kernel")).startswith(_KEPT_MODULES):
            module.unlink()
    subprocess.run(["busybox", "depmod", "-b", tree, release.name], check=True)
    (tree / "pruned").touch()
    return tree


def build_initrd(tree: Path) -> Path:
    """Pack busybox, the modules that reach the host's files, and the init script."""
    root = WORK / "initrd"
    shutil.rmtree(root, ignore_errors=True)
    (root / "bin").mkdir(parents=True)
    shutil.copy2(output("sh", "-c", "command -v busybox").strip(), root / "bin" / "busybox")
    (release,) = (tree / "lib" / "modules").iterdir()
    wanted = _with_dependencies(release, _BOOT_MODULES)
    target = root / "lib" / "modules" / release.name
    for module in wanted:
        (target / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(release / module, target / module)
    subprocess.run(["busybox", "depmod", "-b", root, release.name], check=True)
    init = root / "init"
    trees = " ".join(map(str, whole_trees(CHECKOUT)))
    init.write_text(_INIT.format(modules=" ".join(_BOOT_MODULES), results=_GUEST_RESULTS, tree=tree, trees=trees))
    stage2 = root / "stage2"
    stage2.write_text(_STAGE2.format(results=_GUEST_RESULTS))
    for script in (init, stage2):
        script.chmod(0o755)
    image = WORK / "initrd.img"
    listing = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with image.open("wb") as out:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=listing.encode(), stdout=out, cwd=root, check=True
        )
    return image


def _with_dependencies(release: Path, names: tuple[str, ...]) -> list[str]:
    """Return the files of modules and of all that they need, by modules.dep."""
    needs: dict[str, list[str]] = {}
    for line in (release / "modules.dep").read_text().splitlines():
        file, _, rest = line.partition(":")
        needs[file] = rest.split()
    by_name = {Path(file).name.split(".")[0].replace("-", "_"): file for file in needs}
    files: dict[str, None] = {}
    for name in names:
        if name in by_name:  # Else it is built into the kernel.
            file = by_name[name]
            files |= dict.fromkeys([file, *needs[file]])
    return list(files)


def boot(tree: Path, initrd: Path, disk: Path, timeout_s: float) -> None:
    """Run the guest to its end; its console goes to standard output."""
    started = time.monotonic()
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    command = [
        "qemu-system-x86_64",
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", _CORES, "-m", _MEMORY),
        *("-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", " ".join(_KERNEL_ARGUMENTS)),
        *("-drive", f"file={disk},format=raw,if=virtio,readonly=on"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={RESULTS},mount_tag=results,security_model=none"),
        *("-device", "virtio-rng-pci"),
    ]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"vm: ended after {timeout_s:.0f} s\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took, busy = time.monotonic() - started, used.ru_utime + used.ru_stime
    sys.stderr.write(f"vm: the guest ran for {took:.0f} s, in which it had a processor for {busy:.0f} s\n")


if __name__ == "__main__":
    sys.exit(main())
