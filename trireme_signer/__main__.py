# SPDX-License-Identifier: Apache-2.0
"""Command line of the signer: one of its replicas leads, the others wait."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import click
from cryptography import x509
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from enforcer_daemon.errors import EnforcerError, SettingsError
from enforcer_daemon.identity.credential import TrustBundle
from enforcer_daemon.kube.client import ApiError, ClusterApi
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.settings import LogSettings
from enforcer_daemon.telemetry.logs import Logger, open_log
from trireme_signer import metrics
from trireme_signer.cluster import CONFLICT, Cluster
from trireme_signer.issuance import Grant
from trireme_signer.rotation import Schedule
from trireme_signer.service import Service, SignerSettings
from trireme_signer.startup import DEFAULT_TAINT

_LEASE_S, _RENEW_S, _RETRY_S = 15, 10, 2
"""How long a lease lasts without renewal, how long renewing is tried, and the pause between tries, seconds."""
_SERVER_ERRORS = 500
"""HTTP statuses from here on are the server's own trouble, and pass."""
_LEASE = "trireme-signer"


@click.command()
@click.version_option(package_name="trireme")
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="How to reach the API server; else as a pod.")
@click.option("--namespace", required=True, help="Of the DaemonSet, its account, and what the signer keeps.")
@click.option("--trust-domain", default="cluster.local", show_default=True, help="The cluster's name in certificates.")
@click.option("--signer-name", default="trireme.io/node", show_default=True, help="The requests that are served.")
@click.option("--service-account", default="trireme-enforcer", show_default=True, help="The account that may ask.")
@click.option("--daemon-set", default="trireme-enforcer", show_default=True, help="The DaemonSet whose pods may ask.")
@click.option("--secret", default="trireme-authority", show_default=True, help="Secret with the authorities' keys.")
@click.option("--bundle", default="trireme-trust-bundle", show_default=True, help="ConfigMap for the trust bundle.")
@click.option(
    "--extra-bundle",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="PEM of other trust domains' authorities, to be trusted too.",
)
@click.option("--certificate-hours", default=24.0, show_default=True, help="The longest certificate of a node.")
@click.option(
    "--authority-days", default=365.0, show_default=True, help="Life of an authority; replaced at half of it."
)
@click.option("--overlap-hours", default=24.0, show_default=True, help="From making an authority until it signs.")
@click.option(
    "--startup-taint",
    default=DEFAULT_TAINT,
    show_default=True,
    help="Key of the taint that a node loses when its enforcer is ready; empty: none.",
)
@click.option("--metrics-port", default=9471, show_default=True, help="HTTP port for metrics and liveness; 0: none.")
@click.option("--identity", default=socket.gethostname, help="This replica's name in the lease.  [default: the host's]")
def main(
    kubeconfig: Path | None, extra_bundle: Path | None, metrics_port: int, identity: str, **options: str | float
) -> None:
    """Sign the certificates of the cluster's nodes for the enforcer's DaemonSet."""
    log = open_log(LogSettings(), replica=identity)
    status = 0
    try:
        settings = _settings(extra_bundle, options)
        if metrics_port:
            metrics.serve(metrics_port)
        with tempfile.TemporaryDirectory(prefix="trireme-signer-") as scratch:
            api = ClusterApi(kubeconfig, Path(scratch) / "kubeconfig")
            asyncio.run(_run(api, settings, identity, log))
    except* (EnforcerError, OSError, ValueError) as group:
        for problem in group.exceptions:
            log.error("cannot go on", error=str(problem))
        status = 1
    sys.exit(status)  # Within the block above it would become part of a group, and be shown with a traceback.


def _settings(extra_bundle: Path | None, options: Mapping[str, Any]) -> SignerSettings:
    life, overlap = timedelta(days=options["authority_days"]), timedelta(hours=options["overlap_hours"])
    certificate = timedelta(hours=options["certificate_hours"])
    if not timedelta(0) < 2 * (overlap + certificate) < life:
        raise SettingsError("--authority-days: half of it must be more than --overlap-hours and --certificate-hours")
    grant = Grant(
        options["signer_name"],
        options["trust_domain"],
        options["namespace"],
        options["service_account"],
        options["daemon_set"],
        int(certificate.total_seconds()),
    )
    extra = "" if extra_bundle is None else extra_bundle.read_text(encoding="ascii")
    if extra:
        TrustBundle(x509.load_pem_x509_certificates(extra.encode()))  # Nobody is told of what cannot be read.
    schedule = Schedule(life, overlap, certificate)
    return SignerSettings(
        grant, schedule, options["secret"], options["bundle"], extra, startup_taint=options["startup_taint"]
    )


async def _run(api: ClusterApi, settings: SignerSettings, identity: str, log: Logger) -> None:
    """Stand for election, and work when elected; return at SIGTERM, raise EnforcerError when the lease is lost."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    await api.open()
    try:
        async with asyncio.TaskGroup() as tasks:
            candidacy = tasks.create_task(_stand(api, settings, identity, log))
            await over.wait()
            candidacy.cancel()
    finally:
        await api.close()
    log.info("stopped")


async def _stand(api: ClusterApi, settings: SignerSettings, identity: str, log: Logger) -> NoReturn:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def lead() -> None:
        log.info("leads", signer=settings.grant.signer_name)
        metrics.LEADER.set(1)
        try:
            await Service(api, settings, ClusterLimits(), log, random.random).lead()
        except EnforcerError as err:
            failed.set_exception(err)

    async def stop() -> None:
        metrics.LEADER.set(0)

    await _until_lease(Cluster(api), settings.grant.namespace, log)
    lock = LeaseLock(_LEASE, settings.grant.namespace, identity, api.client)
    config = Config(lock, _LEASE_S, _RENEW_S, _RETRY_S, lead, stop)
    election = asyncio.ensure_future(LeaderElection(config).run())
    try:
        await asyncio.wait((election, failed), return_when=asyncio.FIRST_COMPLETED)
    finally:
        election.cancel()
    for ended in (failed, election):
        if ended.done() and (err := ended.exception()) is not None:
            raise EnforcerError(f"cannot lead: {err}") from err
    raise EnforcerError("the lease was lost: another replica leads")


async def _until_lease(cluster: Cluster, namespace: str, log: Logger) -> None:
    """Wait for the API server. Ending instead would have kubelet wait ever longer, also when the server is back."""
    said = ""
    while True:
        try:
            return await _ensure_lease(cluster, namespace)
        except ApiError as err:
            if 0 < err.status < _SERVER_ERRORS:
                raise
            if str(err) != said:
                said = str(err)
                log.warning("waits for the API server", error=said)
        await asyncio.sleep(_RETRY_S)


async def _ensure_lease(cluster: Cluster, namespace: str) -> None:
    """Make the lease where there is none: the client's own way of creating one fails (pretty=True is no string)."""
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": _LEASE}, "spec": {}}
    try:
        if await cluster.find(f"{path}/{_LEASE}") is None:
            await cluster.create(path, lease)
    except ApiError as err:
        if err.status != CONFLICT:
            raise


if __name__ == "__main__":
    main()
