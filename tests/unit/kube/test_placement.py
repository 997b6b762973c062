# SPDX-License-Identifier: Apache-2.0
"""Look-ups of placement against an API server over HTTP: what is found, asked again, and left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from enforcer_daemon.errors import TokenError
from enforcer_daemon.handshake.lookups import MAX_WAITING_OF_NODE
from enforcer_daemon.handshake.placement import Placement
from enforcer_daemon.kube import placement as module
from enforcer_daemon.kube.client import ClusterApi
from enforcer_daemon.kube.placement import PlacementCheck, PlacementLimits
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.metrics import Metrics
from tests.kube.api import FakeApi

HASH = "0123456789abcdef0123456789abcdef"


def put_pod(api: FakeApi, name: str, node: str = "b", uid: str = "u-1", **annotations: str) -> None:
    metadata = {"name": name, "namespace": "x", "uid": uid, "annotations": annotations}
    api.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"nodeName": node} if node else {}})


def claim(name: str, uid: str = "u-1", node: str = "b", namespace: str = "x") -> Identity:
    return Identity(PodRef(namespace, name), (), {}, {}, node, uid=uid)


class Asking:
    """A check that runs, and what it counted."""

    def __init__(self, api: FakeApi, cluster: ClusterApi) -> None:
        self.api, self.metrics = api, Metrics()
        self.denied: list[tuple[str, str]] = []
        limits = PlacementLimits(max_lookups_per_s=1000.0, retry_s=0.05)
        self.check = PlacementCheck(limits, cluster, structlog.get_logger(), self.metrics, on_denied=self._note)
        self.placement: Placement = self.check.open(Settings(node="a"))

    async def _note(self, node: str, why: str) -> None:
        self.denied.append((node, why))

    def count(self, result: str) -> float:
        name = "trireme_placement_checks_total"
        return self.metrics.registry.get_sample_value(name, {"result": result}) or 0.0

    async def until_counted(self, result: str, count: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.count(result) < count:  # noqa: ASYNC110 - a counter
                await asyncio.sleep(0.005)

    def refusal(self, identity: Identity) -> Reason | None:
        try:
            self.placement.require(identity, asyncio.get_running_loop().time())
        except TokenError as err:
            return err.reason
        return None

    def lookups(self) -> int:
        return sum(path.startswith("/api/v1/namespaces/x/pods/") for _, path in self.api.requests)


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


def run(api: FakeApi, tmp_path: Path, work: Callable[[Asking], Awaitable[None]]) -> None:
    async def main() -> None:
        config = api.write_kubeconfig(tmp_path / "kubeconfig")
        cluster = ClusterApi(config, tmp_path / "scratch")
        await cluster.open()
        asking = Asking(api, cluster)
        task = asyncio.ensure_future(asking.check.run())
        try:
            await work(asking)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await cluster.close()

    asyncio.run(main())


@pytest.mark.parametrize("uid", ["u-1", ""])
def test_a_pod_on_the_node_that_signed_is_looked_up_once(api: FakeApi, tmp_path: Path, uid: str) -> None:
    put_pod(api, "web")

    async def work(asking: Asking) -> None:
        assert asking.refusal(claim("web", uid)) is None
        await asking.until_counted("here")
        assert asking.refusal(claim("web", uid)) is None
        assert asking.lookups() == 1

    run(api, tmp_path, work)


def test_a_static_pod_is_known_by_its_hash(api: FakeApi, tmp_path: Path) -> None:
    mirror = {"kubernetes.io/config.hash": HASH, "kubernetes.io/config.mirror": HASH}
    put_pod(api, "static", uid="the-mirrors", **mirror)

    async def work(asking: Asking) -> None:
        asking.refusal(claim("static", HASH))
        await asking.until_counted("here")

    run(api, tmp_path, work)


@pytest.mark.parametrize(("node", "where"), [("c", "on node c"), ("", "on no node")])
def test_the_very_pod_elsewhere_denies_the_node(api: FakeApi, tmp_path: Path, node: str, where: str) -> None:
    put_pod(api, "web", node=node)

    async def work(asking: Asking) -> None:
        assert asking.refusal(claim("web")) is None
        await asking.until_counted("elsewhere")
        assert asking.denied == [("b", f"it claims pod x/web, which is {where}")]
        assert asking.refusal(claim("other")) is Reason.NODE_DENIED

    run(api, tmp_path, work)


def test_a_pod_that_a_user_dresses_as_the_mirror_of_another_is_no_evidence(api: FakeApi, tmp_path: Path) -> None:
    """The claim's pod was deleted by force; one of its name, bound to another node, states its UID as its hash."""
    put_pod(api, "web", node="c", uid="u-new", **{
        "kubernetes.io/config.hash": "u-1", "kubernetes.io/config.mirror": "u-1"})  # fmt: skip

    async def work(asking: Asking) -> None:
        assert asking.refusal(claim("web", "u-1")) is None
        await asking.until_counted("absent")
        assert (asking.denied, asking.placement.denied) == ([], {})
        assert asking.refusal(claim("web", "u-1")) is Reason.MISPLACED_POD
        assert asking.refusal(claim("other")) is None

    run(api, tmp_path, work)


@pytest.mark.parametrize("uid", ["of-an-earlier-one", ""])
def test_another_pod_of_that_name_denies_the_claim_after_a_second_look(api: FakeApi, tmp_path: Path, uid: str) -> None:
    """A pod of a StatefulSet may have moved by force: no proof that its old node lies."""
    put_pod(api, "web", node="c")

    async def work(asking: Asking) -> None:
        assert asking.refusal(claim("web", uid)) is None
        await asking.until_counted("absent")
        assert asking.lookups() == 2
        assert asking.refusal(claim("web", uid)) is Reason.MISPLACED_POD
        assert asking.refusal(claim("other")) is None
        assert asking.denied == []

    run(api, tmp_path, work)


def test_a_pod_that_is_there_at_the_second_look_is_believed(api: FakeApi, tmp_path: Path) -> None:
    async def work(asking: Asking) -> None:
        asking.api.faults = lambda _: 404 if asking.lookups() < 2 else None
        put_pod(api, "web")
        asking.refusal(claim("web"))
        await asking.until_counted("here")
        assert (asking.lookups(), asking.count("absent")) == (2, 0)

    run(api, tmp_path, work)


@pytest.mark.parametrize(
    ("namespace", "name"), [("x", "../secrets/s"), ("x", "web?limit=1"), ("x", ".."), ("..", "web"), ("x", "")]
)
def test_a_name_that_no_pod_can_have_is_not_asked_for(api: FakeApi, tmp_path: Path, namespace: str, name: str) -> None:
    """Another node wrote it, and it would become part of a path."""

    async def work(asking: Asking) -> None:
        asking.refusal(claim(name, namespace=namespace))
        await asking.until_counted("absent")
        assert not api.requests

    run(api, tmp_path, work)


def test_an_api_server_that_is_away_or_refuses_changes_nothing(api: FakeApi, tmp_path: Path) -> None:
    async def work(asking: Asking) -> None:
        with api.away():
            assert asking.refusal(claim("web")) is None
            await asking.until_counted("unknown")
            assert asking.refusal(claim("web")) is None
            await asking.until_counted("unknown", 2)
        api.faults = lambda _: 403
        assert asking.refusal(claim("web")) is None
        await asking.until_counted("unknown", 3)
        assert (asking.denied, asking.placement.denied) == ([], {})

    run(api, tmp_path, work)


def test_more_claims_than_may_wait_are_looked_up_at_a_later_contact(api: FakeApi, tmp_path: Path) -> None:
    async def work(asking: Asking) -> None:
        # Without a turn of the loop, nothing is taken out.
        for number in range(1_030):
            assert asking.refusal(claim(f"p{number}", node=f"n{number}")) is None
        assert asking.count("skipped") == 6

    run(api, tmp_path, work)


def test_a_node_that_makes_up_pods_is_refused_where_its_share_is_full(api: FakeApi, tmp_path: Path) -> None:
    """And the others' pods are looked up by turns with it, however many it makes up."""

    async def work(asking: Asking) -> None:
        put_pod(api, "web", node="c")
        refused = [asking.refusal(claim(f"p{n}", namespace=f"n{n % 3}")) for n in range(MAX_WAITING_OF_NODE + 50)]
        assert refused.count(Reason.UNCONFIRMED_POD) == 50
        assert asking.count("refused") == 50
        assert asking.refusal(claim("web", node="c")) is None
        await asking.until_counted("here")
        paths = [path for _, path in asking.api.requests]
        turn = next(number for number, path in enumerate(paths) if path.endswith("/pods/web"))
        assert sum("/pods/p" in path for path in paths[:turn]) <= 2
        assert asking.refusal(claim("web", node="c")) is None

    run(api, tmp_path, work)


def test_no_more_wait_for_a_second_look_than_may(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_AGAIN", 2)

    async def work(asking: Asking) -> None:
        asking.check.limits = replace(asking.check.limits, retry_s=60.0)
        for number in range(4):
            assert asking.refusal(claim(f"p{number}")) is None
        await asking.until_counted("skipped", 1)
        assert asking.placement.denied == {}

    run(api, tmp_path, work)
