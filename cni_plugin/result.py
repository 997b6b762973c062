# SPDX-License-Identifier: Apache-2.0
# pathlib would take longer to import than the call takes:
# ruff: noqa: PTH118, PTH123
"""prevResult, the result of the plugins before us: the pod's addresses, and which interfaces are its attachment.

Primaries write what they like into entries of other interfaces: AWS VPC CNI adds a placeholder whose name no interface
can have, with a VLAN for a MAC (amazon-vpc-cni-k8s#2961). Such entries are opaque, and none makes an ADD fail.
Azure, Terway and kindnet name the pod's interface without its sandbox. Layouts: tests/vectors/cni-results.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from cni_plugin import messages, spec
from cni_plugin.spec import CniError

SYS_CLASS_NET = "/sys/class/net"
_NO_INTERFACE = -1
"""What libcni before 0.7 writes for an address that refers to no interface (pkg/types/current/types.go)."""


class PrevResult(NamedTuple):
    """What an `add` carries of the result."""

    ips: tuple[str, ...]
    """The pod's own addresses, without their prefix lengths."""
    host_interfaces: tuple[str, ...]
    """Interfaces outside the pod's namespace, as listed: a bridge among them is not the attachment's alone.

    Names that no interface can have are left out.
    """
    mtu: int | None
    """Of the pod's interface; results have it from version 1.1.0 on."""


class _Interface(NamedTuple):
    name: str
    """Empty if no interface can have it."""
    has_sandbox: bool
    mtu: object


def require_prev_result(tree: object) -> dict[str, object]:
    """Return the result as it is; raise CniError: 7 if it is absent, 6 if it is not an object."""
    if tree is None:
        raise CniError(spec.INVALID_CONFIG, "prevResult: is missing; trireme must not be the first plugin of the list")
    if not isinstance(tree, dict):
        raise _malformed("", "must be an object")
    return tree


def read_prev_result(tree: dict[str, object], ifname: str) -> PrevResult:
    """Read the attachment's part of the result; raise CniError (6) with the path of the fault."""
    interfaces = [_read_interface(entry) for entry in _list(tree, "interfaces")]
    is_in_pod = _tell_pods_interfaces(interfaces, ifname)
    addresses = [_read_ip(entry, f"ips[{i}]", is_in_pod) for i, entry in enumerate(_list(tree, "ips"))]
    ips = tuple(dict.fromkeys(address for address in addresses if address is not None))
    if not ips:
        raise _malformed("ips", "has no address of the pod")
    pairs = list(zip(interfaces, is_in_pod, strict=True))
    mtus = [interface.mtu for interface, is_pods in pairs if is_pods and interface.name == ifname]
    host_interfaces = tuple(interface.name for interface, is_pods in pairs if interface.name and not is_pods)
    for name, values in (("ips", ips), ("interfaces", host_interfaces)):
        if len(values) > messages.MAX_ADDRESSES:
            raise _malformed(name, f"must not have more than {messages.MAX_ADDRESSES} entries")
    return PrevResult(ips, host_interfaces, _read_mtu(mtus[0]) if mtus else None)


def pair_ends(names: tuple[str, ...], sys_class_net: str = SYS_CLASS_NET) -> tuple[str, ...]:
    """Leave out interfaces that the kernel knows to stand alone: bridges and physical ones are linked to themselves.

    A name that this namespace does not have is kept: it is the daemon's to refuse.
    """
    return tuple(name for name in names if not _stands_alone(os.path.join(sys_class_net, name)))


def _stands_alone(path: str) -> bool:
    try:
        with open(f"{path}/ifindex") as own, open(f"{path}/iflink") as linked:
            return own.read() == linked.read()
    except FileNotFoundError:
        return False


def _malformed(path: str, problem: str) -> CniError:
    return CniError(spec.UNDECODABLE, f"prevResult{'.' if path else ''}{path}: {problem}")


def _list(tree: dict[str, object], key: str) -> list[object]:
    value = tree.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _malformed(key, "must be a list")
    return value


def _read_interface(entry: object) -> _Interface:
    fields = entry if isinstance(entry, dict) else {}
    name, sandbox = fields.get("name"), fields.get("sandbox")
    is_name = isinstance(name, str) and not messages.ifname_fault(name)
    return _Interface(str(name) if is_name else "", isinstance(sandbox, str) and bool(sandbox), fields.get("mtu"))


def _tell_pods_interfaces(interfaces: list[_Interface], ifname: str) -> list[bool]:
    """Tell which entries are of the pod: those with a sandbox; without one, that of the attachment's own name.

    If an entry of that name has a sandbox, another without one is an interface of the node.
    """
    is_named = not any(interface.has_sandbox and interface.name == ifname for interface in interfaces)
    return [interface.has_sandbox or (is_named and interface.name == ifname) for interface in interfaces]


def _read_mtu(value: object) -> int | None:
    """Return the MTU. Plugins write 0 for "not known": the daemon reads the interface itself then."""
    return value if type(value) is int and 68 <= value <= 65_536 else None


def _read_ip(entry: object, path: str, is_in_pod: list[bool]) -> str | None:
    """Return the address, None if it belongs to the node's side."""
    address = entry.get("address") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(address, str) or not address:
        raise _malformed(f"{path}.address", "must be an address")
    index = entry.get("interface")
    if index is not None and index != _NO_INTERFACE:
        if type(index) is not int or not 0 <= index < len(is_in_pod):
            raise _malformed(f"{path}.interface", "must be an index of prevResult.interfaces")
        if not is_in_pod[index]:
            return None
    return _bare_address(address, f"{path}.address")


def _bare_address(text: str, path: str) -> str:
    address = text.partition("/")[0]
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError) as err:  # ValueError: a zero byte
        raise _malformed(path, f"{text[:60]!r} is not an address") from err
    return address
