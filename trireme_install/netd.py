# SPDX-License-Identifier: Apache-2.0
"""The CNI configuration directory, net.d, as a runtime reads it. Pure.

A runtime takes the files .conf, .conflist and .json in the order of their names' bytes, and of them ONE: the first.
What it does with a first file that it cannot read is the runtime's own: containerd then has no network at all, CRI-O
takes the next file. A list takes further plugins from `<net.d>/<network name>/*.conf` where the runtime's libcni is
1.3.0 or newer and the list does not say loadOnlyInlinedPlugins (https://www.cni.dev/docs/spec/, section 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trireme_install.errors import UnreadableFileError

EXTENSIONS = (".conf", ".conflist", ".json")
LIST_EXTENSION = ".conflist"
DROP_IN_EXTENSION = ".conf"
PLUGIN = "trireme"
"""Type of our plugin's entry, and name of its program."""
MULTUS = "multus"
DEFAULT_VERSION = "0.1.0"
"""What a configuration without cniVersion means (specification)."""
MAX_FILE_BYTES = 1024 * 1024
"""Of one configuration file; real ones have a few kilobytes."""

_NETWORK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*\Z")  # libcni, pkg/utils


class Runtime(Enum):
    """What differs between runtimes here: whether a file that cannot be read hides the ones after it."""

    CONTAINERD = "containerd"
    CRIO = "CRI-O"


@dataclass(frozen=True, slots=True)
class Network:
    """A configuration that a runtime would take."""

    tree: Mapping[str, Any]
    """The whole file, with the keys that nobody here knows."""
    plugins: tuple[Mapping[str, Any], ...]
    """Of a bare configuration: itself."""
    is_list: bool

    @property
    def name(self) -> str:
        return str(self.tree["name"])

    @property
    def version(self) -> str:
        return str(self.tree.get("cniVersion") or DEFAULT_VERSION)

    @property
    def takes_drop_ins(self) -> bool:
        return self.is_list and self.tree.get("loadOnlyInlinedPlugins") is not True

    @property
    def is_multus(self) -> bool:
        """Tell a file of Multus', which hands pods on to another file's network."""
        return self.plugins[0].get("type") == MULTUS


@dataclass(frozen=True, slots=True)
class Listing:
    """What the directory holds: files by name, and the plugin files in its directories."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    drop_ins: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """By directory, which is the name of a network."""

    def candidates(self) -> list[str]:
        """Return the names that a runtime looks at, in its order."""
        return ordered(self.files, EXTENSIONS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a runtime makes of a directory."""

    file: str | None
    """The one file it uses; None if there is none."""
    chain: tuple[Mapping[str, Any], ...] = ()
    """Its plugins, drop-ins included."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Files that it stumbled over, with the fault."""

    @property
    def own_entries(self) -> int:
        return sum(is_own(plugin) for plugin in self.chain)


def ordered(names: Iterable[str], extensions: tuple[str, ...]) -> list[str]:
    """Sort names as Go does, by bytes; a name that is nothing but an extension counts too."""
    taken = [name for name in names if name[name.rfind(".") :] in extensions and "." in name]
    return sorted(taken, key=lambda name: name.encode("utf-8", "surrogateescape"))


def is_own(plugin: Mapping[str, Any]) -> bool:
    """Tell our plugin's entry."""
    return plugin.get("type") == PLUGIN


def decode_json(data: bytes) -> dict[str, Any]:
    """Decode an object; raise UnreadableFileError. What could not be written again as it was is refused."""
    try:
        # UTF-8 without a byte order mark, as Go wants it; json.loads would guess other encodings from bytes.
        tree = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_exact_float)
    except (ValueError, RecursionError) as err:
        raise UnreadableFileError(f"not JSON: {err}") from err
    if not isinstance(tree, dict):
        raise UnreadableFileError("not a JSON object")
    return tree


def encode_json(tree: Mapping[str, Any]) -> bytes:
    """Encode an object for people to read, keys in their order."""
    return json.dumps(tree, indent=2, allow_nan=False).encode() + b"\n"


def is_same(one: object, other: object) -> bool:
    """Compare by content, as JSON does: in Python True is 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def decode_file(name: str, data: bytes) -> Network:
    """Read one file by its extension; raise UnreadableFileError if runtimes would refuse it."""
    tree = decode_json(data)
    network = tree.get("name")
    if not isinstance(network, str) or not _NETWORK_NAME.match(network):
        raise UnreadableFileError("name: must be a network's name")
    if not isinstance(tree.get("cniVersion", ""), str):
        raise UnreadableFileError("cniVersion: must be a string")
    if not name.endswith(LIST_EXTENSION):
        return Network(tree, (_plugin(tree, ""),), is_list=False)
    plugins = tree.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise UnreadableFileError("plugins: must be a list with at least one plugin")
    return Network(tree, tuple(_plugin(entry, f"plugins[{i}].") for i, entry in enumerate(plugins)), is_list=True)


def load(listing: Listing, runtime: Runtime, *, reads_drop_ins: bool, network_name: str | None = None) -> Loaded:
    """Return which file a runtime uses, and which plugins it runs.

    `network_name`: of CRI-O's cni_default_network; of the files that configure it the first counts.
    """
    unreadable: list[tuple[str, str]] = []
    for name in listing.candidates():
        try:
            network = decode_file(name, listing.files[name])
            dropped = _dropped_in(listing, network) if reads_drop_ins else ()
        except UnreadableFileError as err:
            unreadable.append((name, str(err)))
            if runtime is Runtime.CONTAINERD:
                break
            continue
        if network_name in (None, network.name):
            return Loaded(name, network.plugins + dropped, tuple(unreadable))
    return Loaded(None, (), tuple(unreadable))


def _dropped_in(listing: Listing, network: Network) -> tuple[Mapping[str, Any], ...]:
    if not network.takes_drop_ins:
        return ()
    files = listing.drop_ins.get(network.name, {})
    return tuple(_plugin(decode_json(files[name]), f"{name}: ") for name in ordered(files, (DROP_IN_EXTENSION,)))


def _plugin(entry: object, path: str) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise UnreadableFileError(f"{path or 'the file '}must be an object")
    if not isinstance(entry.get("type"), str) or not entry["type"]:
        raise UnreadableFileError(f"{path}type: must be the name of a plugin")
    return entry


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _exact_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is out of range")
    return number
