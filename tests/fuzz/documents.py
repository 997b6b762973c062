# SPDX-License-Identifier: Apache-2.0
"""Targets of the text decoders: Kubernetes objects as YAML or JSON, and the settings file."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import fields, is_dataclass
from ipaddress import ip_address
from pathlib import Path

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.model import Identity, PodRef, Protocol
from enforcer_daemon.policy import compile_snapshot
from enforcer_daemon.settings_file import load_settings
from enforcer_daemon.sources.manifests import ClusterState, assemble, decode_file, unique_objects

_PEER = Identity(PodRef("shop", "cart-1"), (ip_address("10.1.0.2"),), {"app": "cart"}, {"team": "a"}, "node-1")
_ADDRESSES = (None, ip_address("10.1.0.2"), ip_address("fd00::2"))


def policy(content: bytes) -> None:
    """Read a file as YAML and as JSON; what is wrong is in the result, and what is right can be evaluated by."""
    for name in ("file.yaml", "file.json"):
        file = decode_file(name, content)
        found, problems = unique_objects([file])
        for problem in (*problems, *(problem for entry in file.entries for problem in entry.problems)):
            str(problem).encode()
            assert 0 <= problem.line <= content.count(b"\n") + content.count(b"\r") + 2 * content.count(b"\xc2") + 3
        world = assemble((kubernetes_object for _, kubernetes_object in found.values()), problems)
        _judge(world)


def _judge(world: ClusterState) -> None:
    snapshot = compile_snapshot(world.policies, 1)
    for network_policy in world.policies:
        pod = Identity(PodRef(network_policy.namespace, "web-0"), (), {"app": "web"}, {}, "node-1")
        rules = snapshot.pod_policy(pod)
        for direction in (rules.ingress, rules.egress):
            for address in _ADDRESSES:
                could = direction.could_allow(address, 80, Protocol.TCP)
                if address is not None and direction.evaluate(_PEER, address, 80, Protocol.TCP).is_allowed:
                    assert could


class _File:
    """A file in memory, as far as the settings read it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __str__(self) -> str:
        return "enforcer.yaml"

    def read_text(self, encoding: str) -> str:
        return self._content.decode(encoding)


def settings(content: bytes) -> None:
    """Read a settings file; every path in it can be opened, every text be logged."""
    with suppress(SettingsError):
        _check(load_settings(_File(content)))  # type: ignore[arg-type]


def _check(value: object) -> None:
    match value:
        case Path():
            assert b"\0" not in os.fsencode(value)
        case str():
            value.encode()
        case tuple():
            for item in value:
                _check(item)
        case _ if is_dataclass(value):
            for field in fields(value):
                _check(getattr(value, field.name))
        case _:
            return
