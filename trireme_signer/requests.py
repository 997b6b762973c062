# SPDX-License-Identifier: Apache-2.0
"""One CertificateSigningRequest after the other: approved or denied, and signed once approved.

Approval and signature are two steps, as certificates.k8s.io means them: what somebody else approved is judged again
before it is signed, and fails where it is not what a node asks for.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import serialization

from enforcer_daemon.identity.authority import Authority, issue_credential
from enforcer_daemon.kube.client import NOT_FOUND, ApiError
from enforcer_daemon.telemetry.logs import Logger
from trireme_signer.cluster import CONFLICT, Cluster, Manifest
from trireme_signer.issuance import Grant, Granted, RefusedError, Requester, Witnesses, evaluate, identify
from trireme_signer.metrics import REQUESTS

PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_APPROVED, _DENIED, _FAILED = "Approved", "Denied", "Failed"


class RequestDesk:
    """Decides and signs."""

    def __init__(
        self, cluster: Cluster, grant: Grant, signer: Callable[[], Authority], log: Logger, now: Callable[[], datetime]
    ) -> None:
        """`signer` gives the authority that signs at this moment."""
        self._cluster = cluster
        self._grant = grant
        self._signer = signer
        self._log = log
        self._now = now

    async def take(self, request: Manifest) -> None:
        """Do what is to be done about a request; raise ApiError."""
        conditions = _conditions(request)
        if request.get("spec", {}).get("signerName") != self._grant.signer_name or conditions & {_DENIED, _FAILED}:
            return
        if _APPROVED not in conditions:
            await self._decide(request)
        elif not request.get("status", {}).get("certificate"):
            await self._sign(request)

    async def _decide(self, request: Manifest) -> None:
        try:
            requester, _ = await self._evaluate(request)
        except RefusedError as refused:
            await self._conclude(request, "approval", _DENIED, refused.reason, refused.message)
            return
        message = f"sent by pod {self._grant.namespace}/{requester.pod} on node {requester.node}"
        await self._conclude(request, "approval", _APPROVED, "NodeVerified", message)

    async def _sign(self, request: Manifest) -> None:
        try:
            requester, granted = await self._evaluate(request)
        except RefusedError as refused:
            await self._conclude(request, "status", _FAILED, refused.reason, refused.message)
            return
        signer = self._signer()
        certificate = issue_credential(
            signer, granted.key, granted.spiffe_id, self._now(), timedelta(seconds=granted.lifetime_s)
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        status = {**request.get("status", {}), "certificate": base64.b64encode(pem).decode()}
        if await self._store(request, "status", status):
            REQUESTS.labels("signed").inc()
            self._log.info("certificate signed", node=requester.node, until=f"{certificate.not_valid_after_utc:%FT%TZ}")

    async def _evaluate(self, request: Manifest) -> tuple[Requester, Granted]:
        grant, cluster = self._grant, self._cluster
        requester = identify(request, grant)
        for name in (requester.pod, requester.node):
            if not set(name) <= _NAME_CHARACTERS:  # It becomes part of a path.
                raise RefusedError("NotBoundToPod", f"{name!r:.200} is no name of an object")
        witnesses = Witnesses(
            await cluster.find(f"/api/v1/namespaces/{grant.namespace}/pods/{requester.pod}"),
            await cluster.find(f"/api/v1/nodes/{requester.node}"),
            await cluster.find(f"/apis/apps/v1/namespaces/{grant.namespace}/daemonsets/{grant.daemon_set}"),
        )
        return requester, evaluate(request, requester, witnesses, grant)

    async def _conclude(self, request: Manifest, part: str, condition: str, reason: str, message: str) -> None:
        entry = {
            "type": condition,
            "status": "True",
            "reason": reason,
            "message": message,
            "lastUpdateTime": f"{self._now():%FT%TZ}",
        }
        status = dict(request.get("status") or {})
        status["conditions"] = [*(status.get("conditions") or ()), entry]
        if await self._store(request, part, status):
            REQUESTS.labels(condition.lower()).inc()
            name = request["metadata"]["name"]
            self._log.info(f"request {condition.lower()}", request=name, reason=reason, message=message)

    async def _store(self, request: Manifest, part: str, status: Mapping[str, Any]) -> bool:
        """Write a part of a request; tell whether it was still as it was when it was judged."""
        try:
            await self._cluster.replace(f"{PATH}/{request['metadata']['name']}/{part}", {**request, "status": status})
        except ApiError as err:
            if err.status in (CONFLICT, NOT_FOUND):  # Somebody was faster; the watch brings what came of it.
                return False
            raise
        return True


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-")


def _conditions(request: Manifest) -> set[str]:
    return {str(condition.get("type")) for condition in request.get("status", {}).get("conditions") or ()}
