# SPDX-License-Identifier: Apache-2.0
"""The signer at work: keeps the authorities, publishes the bundle, serves requests, and frees nodes, while it leads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NoReturn

from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.identity.authority import Authority
from enforcer_daemon.kube.client import ApiError, ClusterApi
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.reflector import Reflector, Surroundings
from enforcer_daemon.kube.resources import Resource
from enforcer_daemon.kube.table import Table
from enforcer_daemon.telemetry.logs import Logger
from trireme_signer.cluster import Cluster, Manifest
from trireme_signer.custody import CustodyError, bundle_pem, read_custody
from trireme_signer.issuance import Grant
from trireme_signer.requests import PATH, RequestDesk
from trireme_signer.rotation import Authorities, Schedule
from trireme_signer.startup import StartupTaints

_TIMERS_EVERY_S = 30.0
"""How often the authorities are looked at, seconds; more often where their steps are shorter."""
_RETRY_S = 2.0
_BUNDLE_ENTRY = "bundle.pem"


@dataclass(frozen=True, slots=True)
class SignerSettings:
    """What the signer is told."""

    grant: Grant
    schedule: Schedule = field(default_factory=Schedule)
    secret: str = "trireme-authority"  # noqa: S105 - a name
    """Secret with the authorities' keys, in the grant's namespace."""
    bundle: str = "trireme-trust-bundle"
    """ConfigMap that the bundle is published in, in the grant's namespace."""
    extra_bundle: str = ""
    """PEM of authorities of other trust domains, which nodes are to believe too."""
    startup_taint: str = ""
    """Key of the taint that nodes lose when their enforcer is ready; empty: nodes are left alone."""


def request_resource() -> Resource[Manifest]:
    """Requests as they are: they are written back whole."""
    return Resource(
        "certificatesigningrequests", PATH, "certificates.k8s.io/v1", "CertificateSigningRequest", dict, dict
    )


class Service:
    """The work of the one signer that leads."""

    def __init__(
        self,
        api: ClusterApi,
        settings: SignerSettings,
        limits: ClusterLimits,
        log: Logger,
        roll: Callable[[], float],
    ) -> None:
        self._cluster = cluster = Cluster(api)
        self._settings = settings
        self._log = log
        self._authorities: Authorities | None = None
        self._wake = asyncio.Event()
        self._desk = RequestDesk(self._cluster, settings.grant, self._signer, log, _now)

        def shared(on_change: Callable[[], None]) -> Surroundings:
            return Surroundings(api, limits, log, on_change, roll)

        selector = f"spec.signerName={settings.grant.signer_name}"
        self._requests: Reflector[Manifest] = Reflector(Table(request_resource()), shared(self._wake.set), selector)
        taint = settings.startup_taint
        self._taints = StartupTaints(cluster, settings.grant, taint, shared, log) if taint else None

    def _signer(self) -> Authority:
        if self._authorities is None:
            raise CustodyError("the authorities have not been read yet")
        return self._authorities.signer

    async def lead(self) -> None:
        """Work until cancelled."""
        await self._until_done(self.reconcile)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconcile_forever(), name="authorities")
            tasks.create_task(self._requests.run(), name="requests")
            tasks.create_task(self._serve(), name="desk")
            if self._taints is not None:
                tasks.create_task(self._taints.run(), name="startup taints")

    async def _until_done(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except EnforcerError as err:
                self._log.error("authorities", error=str(err))
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _reconcile_forever(self) -> NoReturn:
        while True:
            await asyncio.sleep(min(_TIMERS_EVERY_S, self._settings.schedule.delay.total_seconds() / 4))
            await self._until_done(self.reconcile)

    async def _serve(self) -> NoReturn:
        """Look at every request after each change, and again where the API server did not do its part."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for entry in list(self._requests.table.entries.values()):
                try:
                    await self._desk.take(dict(entry.value or {}))
                except ApiError as err:
                    self._log.warning("request not served", request=entry.key[1], error=str(err))
                    asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def reconcile(self) -> None:
        """Bring authorities, Secret and bundle to where they should be now; raise EnforcerError.

        The Secret is written first: nothing is signed, and nobody is told of an authority, whose key could be lost.
        """
        namespace, name = self._settings.grant.namespace, self._settings.secret
        path = f"/api/v1/namespaces/{namespace}/secrets"
        secret = await self._cluster.find(f"{path}/{name}")
        data: Mapping[str, str] = (secret or {}).get("data") or {}
        annotations = (secret or {}).get("metadata", {}).get("annotations") or {}
        grant, schedule = self._settings.grant, self._settings.schedule
        custody = read_custody(data, annotations, grant.trust_domain, schedule, _now())
        if dict(custody.data) != dict(data):
            if secret is None:
                secret = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": {"name": name}}
                await self._cluster.create(path, {**secret, "data": custody.data})
            else:
                await self._cluster.replace(f"{path}/{name}", {**secret, "data": custody.data})
            self._log.info("authorities stored", authorities=[repr(keeper) for keeper in custody.authorities.kept])
        self._authorities = custody.authorities
        text = bundle_pem(custody.authorities) + self._settings.extra_bundle
        await self._publish_map(text)
        await self._publish_cluster_bundle(text)

    async def _publish_map(self, text: str) -> None:
        name = self._settings.bundle
        path = f"/api/v1/namespaces/{self._settings.grant.namespace}/configmaps"
        await self._put(path, name, {"apiVersion": "v1", "kind": "ConfigMap", "data": {_BUNDLE_ENTRY: text}}, "data")

    async def _publish_cluster_bundle(self, text: str) -> None:
        """Publish a ClusterTrustBundle where the API server has such a thing."""
        signer = self._settings.grant.signer_name
        name = f"{signer.replace('/', ':')}:nodes"
        for version in ("v1", "v1beta1"):
            group = f"/apis/certificates.k8s.io/{version}"
            served = await self._cluster.find(group)
            if not any(kind.get("name") == "clustertrustbundles" for kind in (served or {}).get("resources") or ()):
                continue
            body = {"apiVersion": f"certificates.k8s.io/{version}", "kind": "ClusterTrustBundle"}
            await self._put(
                f"{group}/clustertrustbundles",
                name,
                {**body, "spec": {"signerName": signer, "trustBundle": text}},
                "spec",
            )
            return

    async def _put(self, path: str, name: str, manifest: Manifest, part: str) -> None:
        """Create an object, or replace it where this part of it differs."""
        present = await self._cluster.find(f"{path}/{name}")
        if present is None:
            await self._cluster.create(path, {**manifest, "metadata": {"name": name}})
        elif present.get(part) != manifest[part]:
            await self._cluster.replace(f"{path}/{name}", {**present, part: manifest[part]})
        else:
            return
        self._log.info("trust bundle published", kind=manifest["kind"], name=name)


def _now() -> datetime:
    return datetime.now(UTC)
