# SPDX-License-Identifier: Apache-2.0
# pathlib would take longer to import than the call takes:
# ruff: noqa: PTH116
"""The pod's network namespace: opened once, checked, and handed to the daemon as a descriptor."""

from __future__ import annotations

import fcntl
import os

from cni_plugin import messages
from cni_plugin.spec import CniError

NS_GET_NSTYPE = 0xB703
"""linux/nsfs.h"""
CLONE_NEWNET = 0x4000_0000
"""linux/sched.h"""
_NODE_NAMESPACES = ("/proc/self/ns/net", "/proc/1/ns/net")


def open_netns(path: str) -> int:
    """Open the namespace and return its descriptor, which the caller owns; raise CniError (4, 8)."""
    try:
        # O_NONBLOCK: whatever lies at the path must not keep us waiting, as a FIFO would.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as err:  # ValueError: a zero byte in the path
        raise CniError(messages.UNUSABLE_NETNS, f"CNI_NETNS: {path}: {getattr(err, 'strerror', err)}") from err
    try:
        _check(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(descriptor: int, path: str) -> None:
    try:
        kind = fcntl.ioctl(descriptor, NS_GET_NSTYPE)
    except OSError as err:
        raise CniError(messages.UNUSABLE_NETNS, f"CNI_NETNS: {path}: is not a namespace") from err
    if kind != CLONE_NEWNET:
        raise CniError(messages.UNUSABLE_NETNS, f"CNI_NETNS: {path}: is not a network namespace")
    if _is_the_nodes(os.fstat(descriptor)):
        raise CniError(messages.NODE_NETNS, f"CNI_NETNS: {path}: is the node's own; enforcing there would cut it off")


def _is_the_nodes(netns: os.stat_result) -> bool:
    for path in _NODE_NAMESPACES:
        try:
            own = os.stat(path)
        except OSError:  # process 1 may be another's to look at; our own namespace never is
            continue
        if (own.st_dev, own.st_ino) == (netns.st_dev, netns.st_ino):
            return True
    return False
