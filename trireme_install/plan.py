# SPDX-License-Identifier: Apache-2.0
"""What to change in net.d so that pods get our plugin: from what the directory holds to a list of steps. Pure.

Every step leaves a directory that a runtime can read, with our plugin at most once in the chain that it runs (but for
the moment between the two steps of a change to or from drop-in mode, when it may be there twice; an ADD can be
repeated). The entry that pods rely on is written before one that has become superfluous goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trireme_install.errors import UnreadableFileError
from trireme_install.netd import (
    PLUGIN,
    Listing,
    Network,
    Runtime,
    decode_file,
    decode_json,
    encode_json,
    is_own,
    is_same,
    load,
)

SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Of a network that our plugin can be part of (cni_plugin.spec; a test holds the two equal)."""
MARK = "trireme.io/installed"
"""Key of our entry: the mode that put it there. Keys with a slash belong to nobody's schema."""
COPY_OF = "trireme.io/copy-of"
"""Key of our copy of the primary's list: the file that it is a copy of."""
OWNED_NAME = "05-trireme.conflist"
DROP_IN_NAME = "99-trireme.conf"


class Mode(Enum):
    """Where our entry stands."""

    MERGE = "merge"
    OWNED = "owned"
    DROP_IN = "drop-in"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the operator asks for."""

    mode: Mode = Mode.MERGE
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of our entry: runDir, excludedNamespaces and so on."""
    owned_name: str = OWNED_NAME

    @property
    def entry(self) -> dict[str, Any]:
        return {"type": PLUGIN, **self.settings, MARK: self.mode.value}


@dataclass(frozen=True, slots=True)
class Replace:
    """Put other content into somebody's file, if it still is as it was read."""

    path: str
    expected: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class Write:
    """Write a file that is ours alone, with its directory."""

    path: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a file that is ours alone; a directory that is then empty goes too."""

    path: str


Step = Replace | Write | Remove


class Outcome(Enum):
    """What the steps lead to."""

    INSTALLED = "installed"
    WAITING = "waiting"
    """Nothing to install into yet; somebody else's move."""
    REFUSED = "refused"
    """An operator has to change something."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps, in order, and what is so once they are done."""

    outcome: Outcome
    message: str
    steps: tuple[Step, ...] = ()


class _NoPrimaryError(Exception):
    """There is no list to install into."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.plan = Plan(outcome, message)


def plan_install(
    listing: Listing, wanted: Wanted, ignored: frozenset[str] = frozenset(), network_name: str | None = None
) -> Plan:
    """Plan what is missing; no steps where all is as wanted.

    `network_name` is the network that the runtime is told to use; None: that of the first file. `ignored` are files
    that could not be read for so long that nobody can still be writing them: CRI-O passes over them, so the network
    after them is the one to protect.
    """
    try:
        file, primary = _find_primary(listing, wanted, ignored, network_name)
        match wanted.mode:
            case Mode.MERGE:
                steps = [*_merge(listing, file, primary, wanted), *_leftovers(listing, file, wanted)]
            case Mode.OWNED:
                steps = [*_own(listing, file, primary, wanted), *_leftovers(listing, wanted.owned_name, wanted)]
            case Mode.DROP_IN:
                steps = [*_drop_in(listing, file, primary, wanted), *_leftovers(listing, file, wanted)]
    except _NoPrimaryError as err:
        return err.plan
    return Plan(Outcome.INSTALLED, f"{file}: network {primary.name} has our plugin ({wanted.mode.value})", tuple(steps))


def plan_removal(listing: Listing) -> Plan:
    """Plan to take every entry of ours out of net.d: from lists, as copies and as drop-ins."""
    steps: list[Step] = []
    alone: list[str] = []
    for name, network in _networks(listing):
        if COPY_OF in network.tree:
            continue
        rest = [plugin for plugin in network.plugins if not is_own(plugin)]
        if not network.is_list or len(rest) == len(network.plugins):
            continue
        if rest:
            steps.append(Replace(name, listing.files[name], encode_json({**network.tree, "plugins": rest})))
        else:
            alone.append(name)
    # The copies go last: until then they are what the runtime uses, and after them it finds a list without us.
    steps += [*_drop_in_removals(listing, None), *(Remove(name) for name in _copies(listing))]
    if alone:
        return Plan(
            Outcome.REFUSED, f"{', '.join(alone)}: has no plugin but ours, and is left for you to remove", tuple(steps)
        )
    return Plan(Outcome.INSTALLED, "no configuration of this node names our plugin", tuple(steps))


def apply_step(listing: Listing, step: Step) -> Listing:
    """Return the directory as it is after a step; a Replace whose file has changed does nothing."""
    directory, _, name = step.path.rpartition("/")
    files, drop_ins = dict(listing.files), {key: dict(value) for key, value in listing.drop_ins.items()}
    place = drop_ins.setdefault(directory, {}) if directory else files
    match step:
        case Replace(_, expected, content):
            if place.get(name) == expected:
                place[name] = content
        case Write(_, content):
            place[name] = content
        case Remove():
            place.pop(name, None)
    return Listing(files, {key: value for key, value in drop_ins.items() if value})


def _find_primary(
    listing: Listing, wanted: Wanted, ignored: frozenset[str], network_name: str | None
) -> tuple[str, Network]:
    """Find the file that a runtime would use if we were not there; Multus' hands on to the one after it."""
    wanted_name = network_name
    for name in listing.candidates():
        try:
            network = decode_file(name, listing.files[name])
        except UnreadableFileError as err:
            # A runtime that is told a network is CRI-O, which passes over what it cannot read.
            if name in ignored or name == wanted.owned_name or wanted_name is not None:
                continue
            raise _NoPrimaryError(Outcome.WAITING, f"{name}: {err}; it sorts first, and is left as it is") from err
        if COPY_OF in network.tree or wanted_name not in (None, network.name):
            continue
        if network.is_multus:
            wanted_name = None
            continue
        _check_primary(name, network, wanted)
        return name, network
    if network_name is not None:
        why = f"CRI-O uses the network {network_name!r} (cni_default_network), which no file configures yet"
        raise _NoPrimaryError(Outcome.WAITING, why)
    raise _NoPrimaryError(Outcome.WAITING, "no primary network is configured yet")


def _check_primary(name: str, network: Network, wanted: Wanted) -> None:
    refusal = ""
    if not network.is_list:
        refusal = "a single plugin, which runtimes cannot chain another to; make it a .conflist with `plugins`"
    elif all(is_own(plugin) for plugin in network.plugins):
        refusal = "has no plugin but ours, so pods would get no interface"
    elif network.version not in SUPPORTED_VERSIONS:
        refusal = f"cniVersion {network.version} is none of {', '.join(SUPPORTED_VERSIONS)}"
    elif wanted.mode is Mode.DROP_IN and not network.takes_drop_ins:
        refusal = "loadOnlyInlinedPlugins is true, so drop-ins are not read; use another mode"
    elif wanted.mode is Mode.OWNED and name.encode() <= wanted.owned_name.encode():
        refusal = f"sorts before {wanted.owned_name}; give --owned-name a name that sorts first"
    if refusal:
        raise _NoPrimaryError(Outcome.REFUSED, f"{name}: {refusal}")


def _with_entry(network: Network, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the list with our entry once: where it was, if something stood before it, else at the end.

    Others append themselves too, so the last place is not fought for; all that matters is an earlier plugin's result.
    """
    plugins = list(network.plugins)
    first = next((i for i, plugin in enumerate(plugins) if is_own(plugin)), None)
    others = [plugin for plugin in plugins if not is_own(plugin)]
    place = first or len(others)
    return {**network.tree, "plugins": [*others[:place], dict(entry), *others[place:]]}


def _merge(listing: Listing, file: str, network: Network, wanted: Wanted) -> Iterator[Step]:
    tree = _with_entry(network, wanted.entry)
    if not is_same(tree, network.tree):
        yield Replace(file, listing.files[file], encode_json(tree))


def _own(listing: Listing, file: str, network: Network, wanted: Wanted) -> Iterator[Step]:
    tree = {**_with_entry(network, wanted.entry), COPY_OF: file}
    present = listing.files.get(wanted.owned_name)
    if present is None or not is_same(_tree_or_none(present), tree):
        yield Write(wanted.owned_name, encode_json(tree))


def _drop_in(listing: Listing, file: str, network: Network, wanted: Wanted) -> Iterator[Step]:
    present = listing.drop_ins.get(network.name, {}).get(DROP_IN_NAME)
    if present is None or not is_same(_tree_or_none(present), wanted.entry):
        yield Write(f"{network.name}/{DROP_IN_NAME}", encode_json(wanted.entry))
    others = [plugin for plugin in network.plugins if not is_own(plugin)]
    if len(others) < len(network.plugins):
        yield Replace(file, listing.files[file], encode_json({**network.tree, "plugins": others}))


def _leftovers(listing: Listing, kept: str, wanted: Wanted) -> Iterator[Step]:
    """Take away what another mode, or an earlier primary, left behind."""
    for name, network in _networks(listing):
        if name == kept or COPY_OF in network.tree or not network.is_list:
            continue
        rest = [plugin for plugin in network.plugins if MARK not in plugin]
        if rest and len(rest) < len(network.plugins):
            yield Replace(name, listing.files[name], encode_json({**network.tree, "plugins": rest}))
    is_drop_in = wanted.mode is Mode.DROP_IN
    yield from _drop_in_removals(listing, decode_file(kept, listing.files[kept]).name if is_drop_in else None)
    yield from (Remove(name) for name in _copies(listing) if name != kept)


def _drop_in_removals(listing: Listing, kept: str | None) -> Iterator[Remove]:
    for directory, files in sorted(listing.drop_ins.items()):
        if directory != kept and DROP_IN_NAME in files:
            yield Remove(f"{directory}/{DROP_IN_NAME}")


def _copies(listing: Listing) -> list[str]:
    return [name for name, network in _networks(listing) if COPY_OF in network.tree]


def _networks(listing: Listing) -> Iterator[tuple[str, Network]]:
    for name in listing.candidates():
        try:
            yield name, decode_file(name, listing.files[name])
        except UnreadableFileError:
            continue  # Nobody's entry can be told in it; where that matters, _find_primary has said so.


def _tree_or_none(data: bytes) -> dict[str, Any] | None:
    try:
        return decode_json(data)
    except UnreadableFileError:
        return None


def unreadable_first(listing: Listing) -> str | None:
    """Name the file that keeps every runtime from, or CRI-O past, the first network; None if there is none."""
    stumbled = load(listing, Runtime.CONTAINERD, reads_drop_ins=False).unreadable
    return stumbled[0][0] if stumbled else None
