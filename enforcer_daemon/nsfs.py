# SPDX-License-Identifier: Apache-2.0
"""Which network namespace a descriptor stands for, as the kernel says it: nsfs files, ioctl_ns(2)."""

from __future__ import annotations

import fcntl
import os

from enforcer_daemon.errors import NetnsError
from enforcer_daemon.model import NetnsId

NS_GET_NSTYPE = 0xB703
"""linux/nsfs.h"""
CLONE_NEWNET = 0x4000_0000
"""linux/sched.h"""


def netns_id(fd: int) -> NetnsId:
    """Return which namespace a descriptor stands for; raise NetnsError if it is no network namespace."""
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
        stat = os.fstat(fd)
    except OSError as err:
        raise NetnsError(f"descriptor {fd} is not of a namespace: {err.strerror}") from err
    if kind != CLONE_NEWNET:
        raise NetnsError(f"descriptor {fd} is not of a network namespace")
    return NetnsId(stat.st_dev, stat.st_ino)
