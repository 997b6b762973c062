# SPDX-License-Identifier: Apache-2.0
"""Says in words what this node's runtime will do with a new pod, and what is wrong with that. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from trireme_install.netd import PLUGIN, Listing, Loaded, Runtime, decode_file, load
from trireme_install.plan import COPY_OF, DROP_IN_NAME
from trireme_install.runtimes import RuntimeSettings


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about the node."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on the node."""

    conf_dir: str
    bin_dir: str
    listing: Listing
    program_fault: str | None
    """Why the plugin does not answer VERSION; None if it does."""
    daemon_fault: str | None
    """Why the daemon's socket does not answer; None if it does."""
    runtimes: tuple[RuntimeSettings, ...] = ()
    runtime_faults: tuple[str, ...] = ()
    """Settings of a runtime that could not be read."""
    unenforced: tuple[str, ...] = ()
    """Pods that started past the daemon, by its own status."""


def diagnose(facts: Facts) -> list[Finding]:
    """Return all findings, in the order in which a pod meets their subjects."""
    return [
        *_runtimes(facts),
        *_configuration(facts),
        _answer(facts.program_fault, f"{facts.bin_dir}/{PLUGIN} answers VERSION", "no pod can start"),
        _answer(facts.daemon_fault, "the enforcer answers on its socket", "pods wait for it, and then fail to start"),
        *_evidence(facts),
    ]


def _evidence(facts: Facts) -> Iterator[Finding]:
    if facts.unenforced:
        named = ", ".join(facts.unenforced)
        yield Finding(Level.PROBLEM, f"pods started without a call of the plugin, and are NOT enforced: {named}")


def _answer(fault: str | None, fine: str, consequence: str) -> Finding:
    return Finding(Level.OK, fine) if fault is None else Finding(Level.PROBLEM, f"{fault}: {consequence}")


def _runtimes(facts: Facts) -> Iterator[Finding]:
    for fault in facts.runtime_faults:
        yield Finding(Level.WARNING, fault)
    if not facts.runtimes:
        yield Finding(Level.WARNING, f"no runtime's settings found; supposing that it reads {facts.conf_dir}")
    for settings in facts.runtimes:
        yield from _directories(facts, settings)
        for entry in settings.classes:
            if entry.bypass:
                yield Finding(Level.WARNING, f"pods of runtime {entry.name} are not enforced: {entry.bypass}")
            if entry.conf_dir is not None and entry.conf_dir.rstrip("/") != facts.conf_dir:
                text = f"runtime {entry.name} reads {entry.conf_dir}, where nothing is installed"
                yield Finding(Level.PROBLEM, text)


def _directories(facts: Facts, settings: RuntimeSettings) -> Iterator[Finding]:
    runtime = settings.runtime.value
    if settings.conf_dir is not None and settings.conf_dir.rstrip("/") != facts.conf_dir:
        text = f"{runtime} reads {settings.conf_dir} ({settings.source}), not {facts.conf_dir}: give --conf-dir"
        yield Finding(Level.PROBLEM, text)
    if settings.bin_dirs and facts.bin_dir not in [path.rstrip("/") for path in settings.bin_dirs]:
        places = ", ".join(settings.bin_dirs)
        text = f"{runtime} looks for plugins in {places} ({settings.source}), not in {facts.bin_dir}: give --bin-dir"
        yield Finding(Level.PROBLEM, text)
    if settings.max_conf_num is not None and settings.max_conf_num != 1:
        text = f"{runtime} has max_conf_num {settings.max_conf_num}: networks after the first are not enforced"
        yield Finding(Level.WARNING, text)
    if settings.default_network is not None:
        text = f"{runtime} uses the network {settings.default_network!r} (cni_default_network), whatever sorts first"
        yield Finding(Level.OK, text)


def _configuration(facts: Facts) -> Iterator[Finding]:
    kinds = sorted({settings.runtime for settings in facts.runtimes} or {Runtime.CONTAINERD}, key=lambda r: r.value)
    for runtime in kinds:
        has_drop_in = any(DROP_IN_NAME in files for files in facts.listing.drop_ins.values())
        told = next((s.default_network for s in facts.runtimes if s.runtime is runtime), None)
        loaded = load(facts.listing, runtime, reads_drop_ins=True, network_name=told)
        if loaded.file is None and told is not None:
            yield Finding(Level.PROBLEM, f"{facts.conf_dir} does not configure the network {told!r}: no pod can start")
            continue
        for name, fault in loaded.unreadable:
            stops = runtime is Runtime.CONTAINERD
            effect = "loads nothing, so no pod can start" if stops else "passes it over"
            yield Finding(Level.PROBLEM if stops else Level.WARNING, f"{name}: {fault}: {runtime.value} {effect}")
        yield from _chain(facts, runtime, loaded)
        if has_drop_in:
            text = f"our entry is a drop-in, which {runtime.value} reads from libcni 1.3.0 on (containerd 2.1)"
            yield Finding(Level.WARNING, text)


def _chain(facts: Facts, runtime: Runtime, loaded: Loaded) -> Iterator[Finding]:
    if loaded.file is None:
        if not loaded.unreadable:
            yield Finding(Level.PROBLEM, f"{facts.conf_dir} has no configuration: no pod can start")
        return
    network = decode_file(loaded.file, facts.listing.files[loaded.file])
    types = ", ".join(str(plugin["type"]) for plugin in loaded.chain)
    yield Finding(
        Level.OK, f"{runtime.value} uses {loaded.file}: network {network.name}, cniVersion {network.version}: {types}"
    )
    if network.is_multus:
        yield Finding(Level.WARNING, f"{loaded.file} is Multus', which hands pods on: see the next file's network")
        rest = {name: data for name, data in facts.listing.files.items() if name != loaded.file}
        behind = load(Listing(rest, facts.listing.drop_ins), runtime, reads_drop_ins=True)
        yield _entries(behind)
        return
    if COPY_OF in network.tree:
        yield Finding(Level.OK, f"{loaded.file} is our copy of {network.tree[COPY_OF]}")
    yield _entries(loaded)


def _entries(loaded: Loaded) -> Finding:
    if loaded.own_entries == 0:
        return Finding(Level.PROBLEM, f"{loaded.file}: our plugin is not in the chain: new pods are NOT enforced")
    if loaded.own_entries > 1:
        return Finding(Level.PROBLEM, f"{loaded.file}: our plugin is in the chain {loaded.own_entries} times")
    if loaded.chain[0].get("type") == PLUGIN:
        return Finding(Level.PROBLEM, f"{loaded.file}: our plugin is the first of the chain: pods get no interface")
    return Finding(Level.OK, f"{loaded.file}: our plugin is in the chain once: new pods are enforced")
