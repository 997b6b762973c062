# SPDX-License-Identifier: Apache-2.0
"""Which proxy leads to the API server, by the environment, as Go's programs read it: kubelet, kubectl and others.

Python's own reading knows no networks in NO_PROXY, and takes `.example.com` for the domain itself too. Operators set
one environment for all components of a node. Source: golang.org/x/net/http/httpproxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.model import IPAddress

_PORTS = {"http": 80, "https": 443}


def proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """Return the URL of the proxy for a URL of http or https, None if there is none; raise SettingsError if it is bad.

    Upper case counts before lower case. There is never a proxy for localhost and loopback addresses.
    """
    parts = urlsplit(url)
    name = f"{parts.scheme}_proxy"
    proxy = environment.get(name.upper()) or environment.get(name) or ""
    host = (parts.hostname or "").rstrip(".")
    port = parts.port or _PORTS.get(parts.scheme, 0)
    if not proxy or is_bypassed(host, port, environment.get("NO_PROXY") or environment.get("no_proxy") or ""):
        return None
    with_scheme = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(with_scheme).scheme not in _PORTS:
        raise SettingsError(f"environment: {name.upper()}: must be a URL of http or https")
    return with_scheme


def is_bypassed(host: str, port: int, no_proxy: str) -> bool:
    """Return whether NO_PROXY names a host: by *, domain, address or network; domain and address may have a port."""
    address, host = _address(host), host.lower()
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_matches(entry.strip().lower(), host, address, port) for entry in no_proxy.split(","))


def _matches(entry: str, host: str, address: IPAddress | None, port: int) -> bool:
    if entry == "*":
        return True
    try:
        network = ip_network(entry, strict=False) if "/" in entry else None
    except ValueError:
        return False
    if network is not None:
        return address is not None and address in network
    name, wanted = _split_port(entry)
    if not name or wanted not in (None, port):
        return False
    if (known := _address(name)) is not None:
        return known == address
    if name.startswith(("*.", ".")):
        return host.endswith(name.removeprefix("*"))
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, int | None]:
    """Split HOST:PORT; an address of IPv6 has brackets if a port follows."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, int(rest[1:]) if rest.startswith(":") and rest[1:].isdecimal() else None
    name, colon, port = entry.rpartition(":")
    if colon and ":" not in name and port.isdecimal():
        return name, int(port)
    return entry, None


def _address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
