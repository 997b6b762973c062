# SPDX-License-Identifier: Apache-2.0
"""The API server that tests talk to behaves as the real one does, as far as they rely on it: by the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import load_kube_config

from tests.kube.api import FakeApi


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


def pod(name: str, node: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "x", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"nodeName": node}}


def run(api: FakeApi, tmp_path: Path, work: Callable[[client.ApiClient], Awaitable[None]]) -> None:
    """Do something with the official client, in a loop of its own."""

    async def main() -> None:
        configuration = client.Configuration()
        kubeconfig = str(api.write_kubeconfig(tmp_path / "config"))
        await load_kube_config(kubeconfig, client_configuration=configuration)  # type: ignore[no-untyped-call]
        async with client.ApiClient(configuration) as connection:
            await work(connection)

    asyncio.run(main())


async def get(connection: client.ApiClient, path: str) -> tuple[int, Any]:
    serialized = await connection.param_serialize("GET", path, auth_settings=["BearerToken"])
    response = await connection.call_api(*serialized)
    return response.status, json.loads(await response.read())  # type: ignore[no-untyped-call]


def test_lists_come_in_pages_of_what_a_field_selector_leaves(api: FakeApi, tmp_path: Path) -> None:
    api.put(*(pod(f"p{number}", "b" if number == 3 else "a") for number in range(6)))

    async def work(connection: client.ApiClient) -> None:
        path, names = "/api/v1/pods?limit=2&fieldSelector=spec.nodeName%3Da", []
        status, page = await get(connection, path)
        while token := page["metadata"].get("continue"):
            names += [item["metadata"]["name"] for item in page["items"]]
            status, page = await get(connection, f"{path}&continue={token}")
        names += [item["metadata"]["name"] for item in page["items"]]
        assert (status, names) == (200, ["p0", "p1", "p2", "p4", "p5"])
        assert "kind" not in page["items"][0]

    run(api, tmp_path, work)


def test_a_watch_tells_what_changed_since_a_version(api: FakeApi, tmp_path: Path) -> None:
    api.put(pod("old", "a"))
    version = api.get("Pod", "x", "old")["metadata"]["resourceVersion"]

    async def work(connection: client.ApiClient) -> None:
        path = "/api/v1/pods?watch=true&allowWatchBookmarks=true&fieldSelector=spec.nodeName%3Da&resourceVersion="
        api.put(pod("new", "a"), pod("other", "b"))
        response = await connection.call_api("GET", f"{api.url}{path}{version}")
        lines = response.response.content
        assert [json.loads(await lines.readline())[key] for key in ("type",)] == ["ADDED"]
        api.patch("Pod", "x", "new", {"spec": {"nodeName": "b"}})
        gone = json.loads(await lines.readline())
        assert (gone["type"], gone["object"]["metadata"]["name"]) == ("DELETED", "new")
        api.bookmark()
        assert json.loads(await lines.readline())["type"] == "BOOKMARK"
        api.compact()
        assert json.loads(await lines.readline())["object"]["code"] == 410
        assert await lines.readline() == b""
        status, answer = await get(connection, f"{path}{version}")
        assert (status, answer["reason"]) == (410, "Expired")

    run(api, tmp_path, work)


def test_requests_for_certificates_are_signed_by_the_test(api: FakeApi, tmp_path: Path) -> None:
    async def work(connection: client.ApiClient) -> None:
        certificates = client.CertificatesV1Api(connection)
        spec = client.V1CertificateSigningRequestSpec(
            request="LS0t", signer_name="example.org/signer", usages=["digital signature"]
        )
        metadata = client.V1ObjectMeta(generate_name="node-")
        request = client.V1CertificateSigningRequest(metadata=metadata, spec=spec)
        created = await certificates.create_certificate_signing_request(request)
        assert created.metadata is not None
        name = created.metadata.name
        assert isinstance(name, str)
        api.patch("CertificateSigningRequest", "", name, {"status": {"certificate": "LS0t"}})
        read = await certificates.read_certificate_signing_request(name)
        assert read.status is not None
        assert read.status.certificate == "LS0t"
        with pytest.raises(ApiException, match="already exists"):
            await certificates.create_certificate_signing_request(read)

    run(api, tmp_path, work)


def test_a_stale_replacement_is_a_conflict(api: FakeApi, tmp_path: Path) -> None:
    async def work(connection: client.ApiClient) -> None:
        leases = client.CoordinationV1Api(connection)
        lease = client.V1Lease(metadata=client.V1ObjectMeta(name="leader"), spec=client.V1LeaseSpec())
        first = await leases.create_namespaced_lease("kube-system", lease)
        assert first.spec is not None
        first.spec.holder_identity = "one"
        await leases.replace_namespaced_lease("leader", "kube-system", first)
        with pytest.raises(ApiException, match="modified"):
            await leases.replace_namespaced_lease("leader", "kube-system", first)
        assert api.get("Lease", "kube-system", "leader")["spec"]["holderIdentity"] == "one"

    run(api, tmp_path, work)


def test_away_means_refused_and_then_back_at_the_same_address(api: FakeApi, tmp_path: Path) -> None:
    async def work(connection: client.ApiClient) -> None:
        for _ in range(2):
            with api.away(), pytest.raises(OSError, match="Connect call failed"):
                await get(connection, "/api/v1/pods")
            assert (await get(connection, "/api/v1/pods"))[0] == 200

    run(api, tmp_path, work)
