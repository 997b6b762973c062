# SPDX-License-Identifier: Apache-2.0
"""Notices cheaply that somebody else changed rules: `nft flush ruleset`, a firewall's restart, `iptables -F`.

What is read costs one or a few system calls, so it can be read every second for every pod. A change of it is a reason
to compare the rules, not proof that ours were touched. Source: linux/netfilter/x_tables.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from enforcer_daemon.dataplane.netlink import (
    NETFILTER,
    NETLINK_NETFILTER,
    NFT_GETCHAIN,
    NFT_GETGEN,
    NFT_GETTABLE,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_GEN_ID,
    NFTA_TABLE_HANDLE,
    NFTA_TABLE_NAME,
    ask,
    decode_attributes,
    encode_attribute,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import DataplaneError

NFPROTO_INET, NFPROTO_NETDEV, NFPROTO_BRIDGE = 1, 5, 7  # linux/netfilter.h
_LEGACY_TABLES = (b"raw", b"mangle", b"filter")
_LEGACY_LEVELS = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
_GET_INFO = 64  # IPT_SO_GET_INFO and IP6T_SO_GET_INFO
_GETINFO_BYTES = 84  # name, valid hooks, five entries, five underflows, number of entries, size
_libc = ctypes.CDLL(None, use_errno=True)


class RulesWatch:
    """Rules of one namespace, as they were when they were last noted."""

    __slots__ = ("_open", "_read", "_seen")

    def __init__(self, read: Callable[[], bytes], opened: ExitStack) -> None:
        """Take over what `opened` holds."""
        self._read = read
        self._open = opened
        self._seen = b""

    def note(self) -> None:
        """Take the present rules for right; raise DataplaneError."""
        self._seen = self._read()

    def is_touched(self) -> bool:
        """Return whether there was any change since; raise DataplaneError."""
        return self._read() != self._seen

    def close(self) -> None:
        """Let go of the namespace."""
        self._open.close()


def watch_nft(netns_fd: int) -> RulesWatch:
    """Watch the generation of a namespace's nf_tables rules, which each transaction raises."""
    with ExitStack() as opening:
        sock = opening.enter_context(open_in(netns_fd, lambda: open_netlink(NETLINK_NETFILTER)))
        return RulesWatch(lambda: generation(sock), opening.pop_all())


def watch_legacy(netns_fd: int) -> RulesWatch:
    """Watch the sizes of a namespace's legacy tables, for they have no generation."""
    families = list(_LEGACY_LEVELS) if Path("/proc/net/if_inet6").exists() else [socket.AF_INET]
    with ExitStack() as opening:
        sockets = [opening.enter_context(open_in(netns_fd, partial(_raw, family))) for family in families]
        return RulesWatch(lambda: b"".join(map(_legacy_tables, sockets)), opening.pop_all())


def generation(sock: socket.socket) -> bytes:
    """Return the generation of the rules in the socket's namespace; raise DataplaneError."""
    answer = _ask(sock, NFT_GETGEN, netfilter_head(socket.AF_UNSPEC))
    return b"" if answer is None else decode_attributes(answer).get(NFTA_GEN_ID, b"")


def table_handle(sock: socket.socket, family: int, name: str) -> bytes | None:
    """Return what tells a table from one that was made anew under its name; None if there is none."""
    body = netfilter_head(family) + encode_attribute(NFTA_TABLE_NAME, name.encode() + b"\0")
    answer = _ask(sock, NFT_GETTABLE, body)
    return None if answer is None else decode_attributes(answer).get(NFTA_TABLE_HANDLE)


def chain_state(sock: socket.socket, family: int, table: str, name: str) -> bytes | None:
    """Return a chain's handle, hook and number of rules and references, to be compared; None if there is none."""
    names = ((NFTA_CHAIN_TABLE, table), (NFTA_CHAIN_NAME, name))
    attributes = b"".join(encode_attribute(kind, text.encode() + b"\0") for kind, text in names)
    return _ask(sock, NFT_GETCHAIN, netfilter_head(family) + attributes)


def common_state(
    sock: socket.socket, tables: Iterable[tuple[int, str]], chains: Iterable[tuple[int, str, str]]
) -> tuple[bytes | None, ...]:
    """Return the states of tables and chains, in their order."""
    found = [table_handle(sock, *table) for table in tables]
    return (*found, *(chain_state(sock, *chain) for chain in chains))


def _ask(sock: socket.socket, kind: int, body: bytes) -> bytes | None:
    """Ask nf_tables; the answer is without its header, of which a part is the generation."""
    try:
        answer = ask(sock, kind, body, 1)
    except OSError as err:
        raise DataplaneError(f"netlink: request {kind:#x}: {err.strerror}") from err
    return None if answer is None else answer[NETFILTER.size :]


def _raw(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)


def _legacy_tables(sock: socket.socket) -> bytes:
    return b"".join(_legacy_table(sock, name) for name in _LEGACY_TABLES)


def _legacy_table(sock: socket.socket, name: bytes) -> bytes:
    """Ask by libc: Python's getsockopt passes nothing to the kernel, and the kernel wants the table's name."""
    info, size = ctypes.create_string_buffer(name, _GETINFO_BYTES), ctypes.c_uint(_GETINFO_BYTES)
    if _libc.getsockopt(sock.fileno(), _LEGACY_LEVELS[sock.family], _GET_INFO, info, ctypes.byref(size)) != 0:
        raise DataplaneError(f"table {name.decode()}: its size is not told: {os.strerror(ctypes.get_errno())}")
    return info.raw
