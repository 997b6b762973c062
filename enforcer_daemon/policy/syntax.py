# SPDX-License-Identifier: Apache-2.0
"""What Kubernetes accepts as a name, a label, a port name and a CIDR, with the API server's own words for what it does
not (apimachinery/pkg/util/validation of Kubernetes 1.36). Each check gives the list of its complaints.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError

from enforcer_daemon.model import IPAddress, IPNetwork

_QUALIFIED_NAME = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_DNS_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_SUBDOMAIN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"

_MAX_LABEL_BYTES = 63
_MAX_SUBDOMAIN_BYTES = 253
_MAX_PORT_NAME_BYTES = 15
_MAX_PREFIX_DIGITS = 16  # beyond any meaning, before int() would meet a hostile length

_NAME_PART_RULE = (
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
    f"(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{_QUALIFIED_NAME}')"
)
_LABEL_KEY_RULE = (
    f"a valid label key {_NAME_PART_RULE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
)
_LABEL_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    f"'({_QUALIFIED_NAME})?')"
)
_DNS_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    f"an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{_DNS_LABEL}')"
)
_DNS_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_DNS_SUBDOMAIN}')"
)
_CIDR_RULE = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"

_qualified_name = re.compile(_QUALIFIED_NAME, re.ASCII)
_dns_label = re.compile(_DNS_LABEL, re.ASCII)
_dns_subdomain = re.compile(_DNS_SUBDOMAIN, re.ASCII)
_port_name_characters = re.compile("[-a-z0-9]+", re.ASCII)
_leading_zeros = re.compile("(?<![0-9a-fA-F])0+(?=[0-9a-fA-F])", re.ASCII)


def check_dns_label(value: str) -> list[str]:
    """Check a name such as a namespace's."""
    return _check_form(value, _dns_label, _DNS_LABEL_RULE, f"{_MAX_LABEL_BYTES} bytes")


def check_dns_subdomain(value: str) -> list[str]:
    """Check a name such as a NetworkPolicy's or a pod's."""
    return _check_form(value, _dns_subdomain, _DNS_SUBDOMAIN_RULE, f"{_MAX_SUBDOMAIN_BYTES} characters")


def _check_form(value: str, form: re.Pattern[str], rule: str, limit: str) -> list[str]:
    complaints = []
    if len(value.encode()) > int(limit.split()[0]):
        complaints.append(f"must be no more than {limit}")
    if not form.fullmatch(value):
        complaints.append(rule)
    return complaints


def check_label_key(value: str) -> list[str]:
    """Check the key of a label or annotation: a name, with a DNS subdomain and a slash before it or without."""
    prefix, slash, name = value.rpartition("/")
    if "/" in prefix:
        return [_LABEL_KEY_RULE]
    complaints = []
    if slash and not prefix:
        complaints.append("prefix part must be non-empty")
    elif slash:
        prefix_limit = f"{_MAX_SUBDOMAIN_BYTES} bytes"
        form_complaints = _check_form(prefix, _dns_subdomain, _DNS_SUBDOMAIN_RULE, prefix_limit)
        complaints += [f"prefix part {complaint}" for complaint in form_complaints]
    if not name:
        complaints.append("name part must be non-empty")
    elif len(name.encode()) > _MAX_LABEL_BYTES:
        complaints.append(f"name part must be no more than {_MAX_LABEL_BYTES} bytes")
    if not _qualified_name.fullmatch(name):
        complaints.append(f"name part {_NAME_PART_RULE}")
    return complaints


def check_label_value(value: str) -> list[str]:
    """Check the value of a label; it may be empty."""
    complaints = []
    if len(value.encode()) > _MAX_LABEL_BYTES:
        complaints.append(f"must be no more than {_MAX_LABEL_BYTES} bytes")
    if value and not _qualified_name.fullmatch(value):
        complaints.append(_LABEL_VALUE_RULE)
    return complaints


def check_port_name(value: str) -> list[str]:
    """Check the name of a port (an IANA service name in lower case)."""
    complaints = []
    if len(value.encode()) > _MAX_PORT_NAME_BYTES:
        complaints.append(f"must be no more than {_MAX_PORT_NAME_BYTES} characters")
    if not _port_name_characters.fullmatch(value):
        complaints.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not re.search("[a-z]", value):
        complaints.append("must contain at least one letter (a-z)")
    if "--" in value:
        complaints.append("must not contain consecutive hyphens")
    if value.startswith("-") or value.endswith("-"):
        complaints.append("must not begin or end with a hyphen")
    return complaints


def check_port_number(value: int) -> list[str]:
    """Check the number of a port."""
    return [] if 1 <= value <= 65_535 else ["must be between 1 and 65535, inclusive"]


def parse_cidr(value: str, *, mask_host_bits: bool = False) -> tuple[IPNetwork | None, list[str]]:
    """Read a CIDR; where it is no network at all, give None.

    Until 1.36 the API server accepted bits beyond the prefix, leading zeros and IPv4-mapped IPv6, and read them as this
    does: masked, decimal, IPv4. With `mask_host_bits` these are no complaints, for objects stored before.
    """
    text, slash, digits = value.partition("/")
    if not slash or not (digits.isascii() and digits.isdigit()) or len(digits) > _MAX_PREFIX_DIGITS or "%" in text:
        return None, [_CIDR_RULE]
    address = _parse_address(_leading_zeros.sub("", text))
    prefix_length = int(digits)
    if address is None or prefix_length > address.max_prefixlen:
        return None, [_CIDR_RULE]
    complaints = [] if mask_host_bits else _check_canonical(text, digits, address, prefix_length)
    return _network(address, prefix_length), complaints


def parse_address(value: str) -> IPAddress | None:
    """Read an address as the API server did before 1.36: leading zeros are decimal, IPv4-mapped IPv6 is IPv4."""
    address = None if "%" in value else _parse_address(value) or _parse_address(_leading_zeros.sub("", value))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    for family in (IPv4Address, IPv6Address):
        try:
            return family(text)
        except (AddressValueError, NetmaskValueError):
            continue
    return None


def _check_canonical(text: str, digits: str, address: IPv4Address | IPv6Address, prefix_length: int) -> list[str]:
    if _parse_address(text) is None or digits != str(prefix_length):
        return ["must not have leading 0s in IP or prefix length"]
    complaints = []
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        complaints.append("must not have an IPv4-mapped IPv6 address")
    if int(address) & ((1 << (address.max_prefixlen - prefix_length)) - 1):
        complaints.append("must not have bits set beyond the prefix length")
    return complaints


def _network(address: IPv4Address | IPv6Address, prefix_length: int) -> IPNetwork:
    if isinstance(address, IPv4Address):
        return IPv4Network((int(address), prefix_length), strict=False)
    network = IPv6Network((int(address), prefix_length), strict=False)
    mapped = network.network_address.ipv4_mapped
    if mapped is not None and prefix_length >= 96:
        return IPv4Network((int(mapped), prefix_length - 96))
    return network
