# SPDX-License-Identifier: Apache-2.0
"""The node's keys from the cluster: the trust bundle that is published there, and certificates on request.

Both become files in the state directory, which are followed like any other. So whatever was there before is in force
from the first moment of a start, and only a node's very first start needs the API server.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.identity.credential import TrustBundle
from enforcer_daemon.identity.external import external_files, open_external_identity
from enforcer_daemon.kube.certificates import CertificateRequests
from enforcer_daemon.kube.client import SERVICE_ACCOUNT, ClusterApi
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.reflector import Reflector, Surroundings
from enforcer_daemon.kube.resources import Manifest, Resource
from enforcer_daemon.kube.table import Table
from enforcer_daemon.replacement import replace_file
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger

BUNDLE_ENTRY = "bundle.pem"
_BUNDLE_NAME = "trireme-trust-bundle"
_LOOK_S = 0.2


class ClusterCredentials:
    """Keeps certificate and bundle up to date. Run `run` as a task."""

    def __init__(self, settings: Settings, log: Logger, limits: ClusterLimits | None = None) -> None:
        self._settings = settings
        self._log = log
        self._api = ClusterApi(settings.kubernetes.kubeconfig, settings.registration.run_dir / "kubeconfig-credentials")
        self._requests = CertificateRequests(self._api, settings, log, time.time, random.random)
        self._bundle_problem = ""
        self._config_map = settings.credentials.bundle_config_map or f"{_bundle_namespace(settings)}/{_BUNDLE_NAME}"
        namespace, _, name = self._config_map.partition("/")
        surroundings = Surroundings(self._api, limits or ClusterLimits(), log, self._take_bundle, random.random)
        self._bundles = Reflector(Table(_config_maps(namespace)), surroundings, f"metadata.name={name}")

    @property
    def problem(self) -> str:
        """Why there is no certificate or bundle, or no newer one; empty if all is well."""
        if self._requests.problem or self._bundle_problem:
            return self._requests.problem or self._bundle_problem
        if not external_files(self._settings).trust_bundle.exists():
            why = self._bundles.health.problem or "there is no such ConfigMap"
            return f"no trust bundle yet from ConfigMap {self._config_map}: {why}"
        return ""

    async def run(self) -> None:
        """Follow the bundle and ask for certificates, until cancelled."""
        try:
            await self._api.open()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._requests.run(), name="certificates")
                if self._settings.credentials.trust_bundle is None:
                    tasks.create_task(self._bundles.run(), name="trust bundle")
        finally:
            await self._api.close()

    async def until_there(self) -> None:
        """Wait until the node has keys, however long; `run` must be running."""
        said = ""
        while True:
            try:
                open_external_identity(self._settings, time.time())
            except SettingsError:
                if self.problem != said:
                    said = self.problem
                    self._log.info("the node has no certificate yet", waiting_for=said or "the signer")
                await asyncio.sleep(_LOOK_S)
            else:
                return

    def _take_bundle(self) -> None:
        """Write the bundle where it is followed; one that cannot be read changes nothing."""
        for entry in self._bundles.table.entries.values():
            data = (entry.value or {}).get("data")
            text = data.get(BUNDLE_ENTRY) if isinstance(data, dict) else None
            try:
                if not isinstance(text, str):
                    raise ValueError(f"has no entry {BUNDLE_ENTRY}")
                TrustBundle(x509.load_pem_x509_certificates(text.encode()))
                path = external_files(self._settings).trust_bundle
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                replace_file(path, text.encode())
            except (ValueError, OSError) as err:
                self._bundle_problem = f"ConfigMap {self._config_map}: {err}"
                self._log.error("trust bundle refused, the last good one stays in force", error=self._bundle_problem)
            else:
                self._bundle_problem = ""


def own_namespace(environment: Mapping[str, str], file: Path = SERVICE_ACCOUNT / "namespace") -> str:
    """Return the namespace of the pod that the process runs in; empty outside a pod, where nobody says."""
    if named := environment.get("POD_NAMESPACE", "").strip():
        return named
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _bundle_namespace(settings: Settings) -> str:
    """Return the namespace where the bundle is looked for; raise SettingsError if it is needed and not known."""
    namespace = own_namespace(os.environ)
    if not namespace and settings.credentials.trust_bundle is None:
        raise SettingsError(
            "credentials.bundleConfigMap: must be set (NAMESPACE/NAME), or credentials.trustBundle: the daemon does "
            "not run in a pod whose namespace could be taken"
        )
    return namespace


def _config_maps(namespace: str) -> Resource[Manifest]:
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    return Resource("configmaps", path, "v1", "ConfigMap", _reduce, dict)


def _reduce(manifest: Manifest) -> dict[str, object]:
    metadata = manifest.get("metadata")
    names = {key: metadata.get(key) for key in ("name", "namespace")} if isinstance(metadata, dict) else {}
    return {"metadata": names, "data": manifest.get("data")}
