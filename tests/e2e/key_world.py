# SPDX-License-Identifier: Apache-2.0
"""Labs whose nodes have authorities and bundles of their own, files that operators replace while traffic goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from enforcer_daemon.identity.authority import Authority, make_authority
from enforcer_daemon.identity.credential import is_issued_by
from tests.e2e.operation_world import in_background
from trireme_lab import Lab, LabSpec, Outcome, PodSpec, ProbeResult, Tools
from trireme_lab.node import Node
from trireme_lab.probe import run_probe
from trireme_lab.settings import overlay

_PATIENCE_S = 10.0
_POLL_S = 0.05


def new_authority(trust_domain: str = "cluster.local") -> Authority:
    return make_authority(trust_domain, datetime.now(UTC))


def key_pem(authority: Authority) -> bytes:
    return authority.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(*authorities: Authority) -> bytes:
    return b"".join(authority.certificate.public_bytes(Encoding.PEM) for authority in authorities)


class KeyFiles:
    """What an operator gives to a node: its authority, and whom it trusts."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._directory = node.directories.root / "keys"
        self._directory.mkdir(mode=0o700)
        self.certificate = self._directory / "ca.pem"
        self.key = self._directory / "ca.key"
        self.bundle = self._directory / "bundle.pem"

    def settings(self) -> Mapping[str, object]:
        files = {"caCertificate": self.certificate, "caKey": self.key, "trustBundle": self.bundle}
        return {"credentials": {name: str(path) for name, path in files.items()}}

    def write(self, path: Path, content: bytes) -> None:
        """Replace a file as careful operators do."""
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_bytes(content)
        draft.rename(path)

    def issue_by(self, authority: Authority) -> None:
        self.write(self.certificate, certificate_pem(authority))
        self.write(self.key, key_pem(authority))

    def trust(self, *authorities: Authority) -> None:
        self.write(self.bundle, certificate_pem(*authorities))

    # What the node made of it.

    def problems(self) -> str:
        return "\n".join(map(str, self._listed("key_problems")))

    def await_bundle(self, count: int) -> None:
        """Wait until the node trusts so many authorities, and has no problem."""
        await_that(lambda: len(self._listed("bundle")) == count and not self.problems())

    def _listed(self, key: str) -> list[object]:
        value = self._node.status()[key]
        assert isinstance(value, list)
        return value

    def await_issuer(self, authority: Authority) -> None:
        """Wait until the node has a certificate of this authority, and no problem with it."""
        await_that(lambda: is_issued_by(self.node_certificate(), authority.certificate) and not self.problems())

    def node_certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self._node.directories.state / "node.pem").read_bytes())


@dataclass(frozen=True, slots=True)
class Keys:
    """What a node of a lab starts with."""

    issuer: Authority
    bundle: Sequence[Authority]
    settings: Mapping[str, object] = field(default_factory=dict)


@contextmanager
def keyed_lab(
    plugin: Path, keys: Mapping[str, Keys], spec: LabSpec, pods: Sequence[PodSpec]
) -> Iterator[tuple[Lab, dict[str, KeyFiles]]]:
    """Run a lab whose nodes have these keys; pods come after them."""
    with Lab(spec, Tools(plugin=plugin)) as lab:
        files = {}
        for name, node in lab.nodes.items():
            own = files[name] = KeyFiles(node)
            own.issue_by(keys[name].issuer)
            own.trust(*keys[name].bundle)
            before = yaml.safe_load(node.directories.settings.read_text(encoding="utf-8"))
            node.write_settings(overlay(overlay(before, own.settings()), keys[name].settings))
            node.restart()
        for pod in pods:
            lab.add_pod(pod)
        yield lab, files


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(_POLL_S)


def drops(lab: Lab) -> dict[str, object]:
    """Return for what reasons the enforcers dropped anything at all, by node."""
    counted = {name: node.status()["drops"] for name, node in lab.nodes.items()}
    return {name: count for name, count in counted.items() if isinstance(count, dict) and any(count.values())}


@contextmanager
def dialing(lab: Lab, *ways: tuple[str, str]) -> Iterator[list[ProbeResult]]:
    """Connect again and again, each way in turn, for as long as the block lasts; every attempt must succeed."""
    results: list[ProbeResult] = []
    requests = [lab.request(source, target, 8080, version) for source, target in ways for version in (4, 6)]
    is_over = False

    def dial() -> None:
        while not is_over:
            results.extend(run_probe(request) for request in requests)

    with in_background(dial):
        try:
            yield results
        finally:
            is_over = True
    assert len(results) >= len(requests)
    assert [result for result in results if result.outcome is not Outcome.CONNECTED] == []
