# SPDX-License-Identifier: Apache-2.0
"""What is known of a registered pod: a pod without labels is told from one of which nobody said anything."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

import pytest

from enforcer_daemon.daemon.clusterstate import compile_state
from enforcer_daemon.model import AttachmentId, PodRef
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.settings_file import decode_settings
from enforcer_daemon.sources.manifests import assemble, decode_file, unique_objects

POD = b"{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {containers: [{name: c, image: i}]}}"


@pytest.mark.parametrize(
    ("manifest", "labels", "is_known"),
    [(b"", {}, False), (b"", {"app": "web"}, True), (POD, {}, True)],
)
def test_labels_are_known_by_a_manifest_or_by_the_runtime(
    manifest: bytes, labels: Mapping[str, str], *, is_known: bool
) -> None:
    found, problems = unique_objects([decode_file("pods.yaml", manifest)])
    assert problems == []
    world = compile_state(assemble((entry for _, entry in found.values()), ()), decode_settings({"node": "a"}), None)
    attachment = AttachmentId("c1", "eth0")
    request = AddRequest(
        attachment, "/n", "net", PodRef("shop", "web"), "", labels, (ip_address("10.0.0.1"),), (), None
    )
    assert world.knows_labels({attachment: request}) is is_known
