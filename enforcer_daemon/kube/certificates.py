# SPDX-License-Identifier: Apache-2.0
"""The node's certificate from the cluster: a key made here, a CertificateSigningRequest, and the answer on disk.

The key never leaves the node. Key and certificate lie in one file in the state directory, which is replaced in one step
and followed like any file of keys; so a restart needs no API server, and a renewal no restart.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.errors import CredentialError, EnforcerError, SettingsError
from enforcer_daemon.identity.authority import node_spiffe_id
from enforcer_daemon.identity.credential import Credential, decode_credential
from enforcer_daemon.identity.external import external_files, open_external_identity
from enforcer_daemon.identity.keystore import key_pem
from enforcer_daemon.identity.request import make_request
from enforcer_daemon.kube.backoff import backoff_s
from enforcer_daemon.kube.client import ApiError, ClusterApi
from enforcer_daemon.replacement import replace_file
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger

PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_USAGES = ["digital signature"]
_SILENCE_S = 30.0
_ANSWER_S = 300.0
"""How long an answer is waited for before another request is made, seconds."""
_FIRST_LOOK_S, _LAST_LOOK_S = 0.1, 5.0
_MAX_BACKOFF_S = 300.0
_LOOK_S = 1.0
_REFUSED = 4
"""Failures that a refusal counts for: the first wait is then two to four seconds."""


class CertificateRefusedError(EnforcerError):
    """The cluster's signer refused, or what it sent cannot be used."""


class CertificateRequests:
    """Sees to it that the node has a certificate. Run it as a task."""

    def __init__(
        self,
        api: ClusterApi,
        settings: Settings,
        log: Logger,
        wall_clock: Callable[[], float],
        roll: Callable[[], float],
    ) -> None:
        """`roll` gives random numbers from 0 to 1."""
        self._api = api
        self._settings = settings
        self._log = log
        self._wall_clock = wall_clock
        self._roll = roll
        self.problem = ""
        """Why there is no certificate, or no newer one; empty if all is well."""

    def is_due(self) -> bool:
        """Return whether to ask for another certificate: it is time, or no peer would trust the present one."""
        now = self._wall_clock()
        try:
            identity = open_external_identity(self._settings, now)
        except SettingsError:
            return True
        return not identity.credential.not_before <= now < identity.renew_at

    async def run(self) -> None:
        """Ask whenever a certificate is due, for ever."""
        failures = 0
        while True:
            # The bundle comes first: without it, no certificate can be evaluated.
            if not external_files(self._settings).trust_bundle.exists() or not self.is_due():
                failures = 0
                await asyncio.sleep(_LOOK_S)
                continue
            try:
                await self.obtain()
                # One that this node's bundle does not vouch for is due again; not at once.
                failures = failures + 1 if self.is_due() else 0
            except CertificateRefusedError as err:
                failures += _REFUSED  # Asking again leaves an object behind, and helps only once somebody acted.
                self._note(str(err))
            except (ApiError, OSError) as err:
                failures += 1
                self._note(str(err))
            if failures:
                await asyncio.sleep(backoff_s(failures, self._roll(), _MAX_BACKOFF_S))

    async def obtain(self) -> None:
        """Make a key and have it certified; raise ApiError, CertificateRefusedError or OSError."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = await self._ask(key)
        self._log.info("certificate asked for", request=name, signer=self._settings.credentials.signer_name)
        certificate = await self._answer(name)
        credential = self._checked(certificate, key)
        replace_file(
            external_files(self._settings).certificate,
            key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM),
        )
        self._note("")
        self._log.info("certificate from the cluster", request=name, not_after=credential.not_after)

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            self._log.error("no certificate from the cluster", error=problem)
        self.problem = problem

    async def _ask(self, key: ec.EllipticCurvePrivateKey) -> str:
        settings = self._settings
        request = make_request(key, node_spiffe_id(settings.trust_domain, settings.node))
        body = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": f"trireme-{settings.node[:200]}-"},
            "spec": {
                "request": base64.b64encode(request).decode(),
                "signerName": settings.credentials.signer_name,
                "expirationSeconds": int(settings.credentials.certificate_lifetime_s),
                "usages": _USAGES,
            },
        }
        answer = await self._api.send("POST", PATH, json.dumps(body).encode(), _SILENCE_S)
        try:
            return str(json.loads(answer)["metadata"]["name"])
        except (ValueError, KeyError, TypeError) as err:
            raise ApiError(f"the answer to a request cannot be read: {err!r}") from err

    async def _answer(self, name: str) -> x509.Certificate:
        """Wait until the request is decided."""
        wait_s, waited_s = _FIRST_LOOK_S, 0.0
        while waited_s < _ANSWER_S:
            await asyncio.sleep(wait_s)
            waited_s, wait_s = waited_s + wait_s, min(2 * wait_s, _LAST_LOOK_S)
            found = read_answer(await self._api.get(f"{PATH}/{name}", {}, _SILENCE_S))
            if found is not None:
                return found
            self.problem = f"request {name} waits for signer {self._settings.credentials.signer_name}"
        raise CertificateRefusedError(f"nobody has answered request {name} for {_ANSWER_S:.0f} s")

    def _checked(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Credential:
        try:
            credential = decode_credential(certificate.public_bytes(serialization.Encoding.DER))
        except CredentialError as err:
            raise CertificateRefusedError(f"the certificate that was sent cannot be used: {err}") from err
        if credential.public_key.public_numbers() != key.public_key().public_numbers():
            raise CertificateRefusedError("the certificate that was sent is for another key")
        if (credential.trust_domain, credential.node) != (self._settings.trust_domain, self._settings.node):
            raise CertificateRefusedError(
                f"the certificate that was sent is for spiffe://{credential.trust_domain}/node/{credential.node}"
            )
        if credential.not_before > self._wall_clock() + self._settings.credentials.clock_leeway_s:
            raise CertificateRefusedError("the certificate that was sent is not valid yet: compare the clocks")
        return credential


def read_answer(body: bytes) -> x509.Certificate | None:
    """Return the certificate that a request was answered with, None while it is undecided.

    Raise CertificateRefusedError if it was refused, ApiError where the answer cannot be read.
    """
    try:
        status: Mapping[str, Any] = json.loads(body).get("status") or {}
        conditions = {str(entry["type"]): entry for entry in status.get("conditions") or ()}
        encoded = status.get("certificate")
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ApiError(f"a request cannot be read: {err!r}") from err
    for kind in ("Denied", "Failed"):
        if kind in conditions:
            why = f"{conditions[kind].get('reason', '')}: {conditions[kind].get('message', '')}"
            raise CertificateRefusedError(f"the request was {kind.lower()} ({why:.300})")
    if not encoded:
        return None
    try:
        return x509.load_pem_x509_certificate(base64.b64decode(encoded, validate=True))
    except (ValueError, TypeError) as err:
        raise CertificateRefusedError(f"the certificate that was sent cannot be read: {err}") from err
