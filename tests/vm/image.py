# SPDX-License-Identifier: Apache-2.0
"""A disk image with what the guest reads most: the checkout, Python's library, the kernel's modules, network tools.

Over 9p each file costs the guest some milliseconds, and a program of Python opens hundreds. So these trees come on an
uncompressed squashfs, which is written in seconds; what is not in it is read through 9p after all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_TOOLS = (
    *("bash", "bsdutils", "conntrack", "containernetworking-plugins", "coreutils", "dash", "dnsmasq-base", "grep"),
    *("hostname", "iperf3", "iproute2", "ipset", "iptables", "ipvsadm", "libc-bin"),
    *("mount", "nftables", "procps", "sed", "util-linux"),
)
"""Packages whose programs tests run in the guest."""
_PASSED_OVER = frozenset(
    {
        *(".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache", "build"),
        *("PyInstaller", "kubernetes_validate", "mypy", "mypyc", "pip", "ruff", "setuptools"),
    }
)
"""Names that the guest has no use for, half of all that there is."""
_PASSED_OVER_IN_PYTHON = frozenset({"site-packages", "dist-packages", "test", "idlelib", "ensurepip"})
_NOT_COMPRESSED = ("-noI", "-noD", "-noF", "-noX")
_LIBRARY = re.compile(r"(/\S+) \(0x")


def whole_trees(checkout: Path) -> dict[Path, frozenset[str]]:
    """Return the folders that are wholly in the image, each with the names that are passed over in it."""
    return {checkout: _PASSED_OVER, Path(sysconfig.get_path("stdlib")): _PASSED_OVER_IN_PYTHON}


def build_image(image: Path, checkout: Path, modules: Path) -> None:
    """Write the image; inside it everything has the path that it has here."""
    files: list[Path] = [*_walk(modules, frozenset())]
    for tree, passed_over in whole_trees(checkout).items():
        files += _walk(tree, passed_over)
    files += _tool_files()
    with_parents = dict.fromkeys(path for file in files for path in (*reversed(file.parents), file))
    listing = b"\0".join(os.fsencode(path.relative_to("/")) for path in with_parents if path != Path("/"))
    image.unlink(missing_ok=True)
    with subprocess.Popen(
        ("tar", "--create", "--no-recursion", "--null", "--files-from=-"),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tar:
        assert tar.stdin is not None
        with subprocess.Popen(
            ("mksquashfs", "-", image, "-tar", "-quiet", "-no-progress", "-no-duplicates", *_NOT_COMPRESSED),
            stdin=tar.stdout,
            stdout=subprocess.DEVNULL,
        ) as pack:
            tar.stdin.write(listing)
            tar.stdin.close()
    if tar.returncode or pack.returncode:
        raise RuntimeError(f"vm: tar ended with {tar.returncode}, mksquashfs with {pack.returncode}")


def _walk(tree: Path, passed_over: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(tree):
        folders[:] = [name for name in folders if name not in passed_over]
        yield Path(folder)
        for name in (*files, *(each for each in folders if Path(folder, each).is_symlink())):
            yield Path(folder, name)


def _tool_files() -> Iterator[Path]:
    """Yield the files of the tools' packages, and the libraries that they load, by the paths without symbolic links."""
    names = output("dpkg-query", "--listfiles", *_TOOLS).splitlines()
    files = {Path(name) for name in names if name.startswith("/") and "/share/" not in name and Path(name).is_file()}
    programs = [file for file in files if os.access(file, os.X_OK)]
    # Shell scripts among them make ldd end with 1.
    found = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    yield from sorted(_with_targets([*files, *(Path(library) for library in _LIBRARY.findall(found))]))


def _with_targets(files: Iterable[Path]) -> set[Path]:
    """Return them with their targets; the folders of a path are resolved, since /bin is a link in one place only."""
    return {path for file in files for path in (file.parent.resolve() / file.name, file.resolve())}


def output(*command: str) -> str:
    """Return what a command prints, in English."""
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
