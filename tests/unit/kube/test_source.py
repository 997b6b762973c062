# SPDX-License-Identifier: Apache-2.0
"""The cluster as a source, against an API server over HTTP: what reaches the state, and what happens without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError, SettingsError
from enforcer_daemon.kube.admission import Admission
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.source import ClusterSource
from enforcer_daemon.model import AttachmentId, PodRef
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.settings import KubernetesSettings, RegistrationSettings, Settings
from enforcer_daemon.sources.manifests import ClusterState
from enforcer_daemon.telemetry.metrics import Metrics
from tests.kube.api import FakeApi

NODE = {
    "apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.1.0.0/24"]},
}  # fmt: skip
HASH = "0123456789abcdef0123456789abcdef"


def policy(name: str, **spec: object) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "x"}
    spec = {"podSelector": {}, **spec}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def pod(name: str, node: str = "a", uid: str = "u-1", **metadata: object) -> dict[str, Any]:
    whole = {"name": name, "namespace": "x", "uid": uid, "labels": {"app": name}, **metadata}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": whole, "spec": {"nodeName": node}}


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        api.put(NODE)
        yield api


@dataclass
class Running:
    """A source that runs, and what it last gave; as the daemon does, it asks for the next state at once."""

    source: ClusterSource
    metrics: Metrics
    states: list[ClusterState] = field(default_factory=list)

    @property
    def policies(self) -> list[str]:
        return [found.name for found in self.states[-1].policies] if self.states else []

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - conditions of every kind
                await asyncio.sleep(0.005)

    async def follow(self) -> None:
        async for state in self.source.states():
            self.states.append(state)

    def metric(self, name: str, resource: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"resource": resource})


LIMITS = ClusterLimits(page_size=2, max_backoff_s=0.1, sync_timeout_s=0.3, save_interval_s=0.01)


def settings_for(api: FakeApi, tmp_path: Path) -> Settings:
    config = tmp_path / "kubeconfig"
    api.write_kubeconfig(config)
    return Settings(
        node="a",
        state_dir=tmp_path / "state",
        registration=RegistrationSettings(run_dir=tmp_path / "run"),
        kubernetes=KubernetesSettings(enabled=True, kubeconfig=config),
    )


@asynccontextmanager
async def running(settings: Settings, limits: ClusterLimits = LIMITS) -> AsyncIterator[Running]:
    metrics = Metrics()
    source = ClusterSource(settings, structlog.get_logger(), metrics, limits=limits)
    await source.open()
    found = Running(source, metrics)
    work = [asyncio.ensure_future(source.run()), asyncio.ensure_future(found.follow())]
    try:
        yield found
    finally:
        for task in work:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def test_the_world_is_listed_in_pages_and_then_followed(api: FakeApi, tmp_path: Path) -> None:
    api.put(*(policy(f"p{number}") for number in range(5)), namespace("x", team="red"))
    api.put(pod("web"), pod("elsewhere", node="b"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            state = found.states[0]
            assert found.policies == [f"p{number}" for number in range(5)]
            assert state.labels_of("x") == {"team": "red", "kubernetes.io/metadata.name": "x"}
            assert list(state.pods) == [PodRef("x", "web")]
            await asyncio.to_thread(api.delete, "NetworkPolicy", "x", "p0")
            await asyncio.to_thread(api.put, policy("p9"), namespace("x", team="blue"), pod("late", node="b"))
            await found.until(lambda: found.policies == ["p1", "p2", "p3", "p4", "p9"])
            await found.until(lambda: found.states[-1].labels_of("x")["team"] == "blue")
            await asyncio.to_thread(api.patch, "Pod", "x", "web", {"metadata": {"labels": {"app": "db"}}})
            await found.until(lambda: found.states[-1].pods[PodRef("x", "web")].labels == {"app": "db"})
            assert list(found.states[-1].pods) == [PodRef("x", "web")]
            assert found.metric("trireme_watch_up", "networkpolicies") == 1
        assert ("GET", "/apis/networking.k8s.io/v1/networkpolicies?limit=2") in api.requests

    asyncio.run(work())


def test_a_change_is_missed_neither_by_gone_nor_by_a_line_that_is_no_event(api: FakeApi, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            for number, disturb in enumerate(
                (api.compact, api.hang_up, lambda: api.send_raw("networkpolicies", b"{\n"))
            ):
                await found.until(lambda: "networkpolicies" in api.watched())
                await asyncio.to_thread(disturb)
                await asyncio.to_thread(api.put, policy(f"p{number}"))
                await found.until(lambda: f"p{number}" in found.policies)  # noqa: B023 - asked at once

    asyncio.run(work())


def test_a_watch_goes_on_from_the_last_bookmark(api: FakeApi, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: "networkpolicies" in api.watched())
            await asyncio.to_thread(api.put, namespace("x"), namespace("y"))
            await asyncio.to_thread(api.bookmark)
            await asyncio.to_thread(api.hang_up)
            version = api.objects.version
            start = "/apis/networking.k8s.io/v1/networkpolicies?watch=true"
            await found.until(
                lambda: any(
                    path.startswith(start) and f"resourceVersion={version}&" in path for _, path in api.requests
                )
            )

    asyncio.run(work())


def test_a_watch_on_which_nothing_happens_is_opened_anew_and_not_lost(api: FakeApi, tmp_path: Path) -> None:
    """A server that has seen no event of a kind since it started sends no bookmarks of it either."""
    settings, limits = settings_for(api, tmp_path), replace(LIMITS, watch_silence_s=1.2)
    start = "/apis/networking.k8s.io/v1/networkpolicies?watch=true"

    async def work() -> None:
        with capture_logs() as logs:
            async with running(settings, limits) as found:
                await found.until(lambda: sum(path.startswith(start) for _, path in api.requests) > 1)
                assert found.metric("trireme_watch_up", "networkpolicies") == 1
                await asyncio.to_thread(api.put, policy("p1"))
                await found.until(lambda: found.policies == ["p1"])
        assert "watch lost" not in [entry["event"] for entry in logs]

    asyncio.run(work())


def test_the_last_state_stays_while_the_server_is_away(api: FakeApi, tmp_path: Path) -> None:
    api.put(policy("p0"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            with api.away():
                await found.until(lambda: found.metric("trireme_watch_up", "networkpolicies") == 0)
                assert found.policies == ["p0"]
                assert "networkpolicies" in found.source.lag()
                assert found.source.problem() == ""
                await asyncio.to_thread(api.put, policy("p1"))
            await found.until(lambda: found.policies == ["p0", "p1"])
            await found.until(lambda: found.source.lag() == "")

    asyncio.run(work())


def test_a_bad_object_is_refused_alone(api: FakeApi, tmp_path: Path) -> None:
    api.put(policy("p0"), policy("bad", policyTypes=["Sideways"]))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            assert found.policies == ["bad", "p0"]
            assert "x/bad: spec.policyTypes[0]" in str(found.states[-1].problems[0])
            await asyncio.to_thread(api.put, policy("p0", egress="all"), policy("p1"))
            await found.until(lambda: "p1" in found.policies)
            assert found.policies == ["bad", "p0", "p1"]
            assert len(found.states[-1].problems) == 2

    asyncio.run(work())


def test_no_world_before_everything_is_listed(api: FakeApi, tmp_path: Path) -> None:
    api.put(policy("p0"))
    api.delays_s["namespaces"] = 3600.0

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: "networkpolicies" in api.watched())
            assert found.states == []
            assert "namespaces" in found.source.problem()
            api.delays_s.clear()
            await found.until(lambda: bool(found.states))
            assert found.policies == ["p0"]

    asyncio.run(work())


def test_a_refused_kind_is_named_and_an_absent_optional_one_is_none(api: FakeApi, tmp_path: Path) -> None:
    faults = {"/api/v1/pods": 403, "/apis/networking.k8s.io/v1/servicecidrs": 404}
    api.faults = lambda request: faults.get(request.path)

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: "pods (HTTP 403" in found.source.problem())
            await found.until(lambda: found.source.problem().count("(") == 1)
            del faults["/api/v1/pods"]
            await found.until(lambda: found.source.is_settled)

    asyncio.run(work())


def test_credentials_are_read_anew_after_a_refusal(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enforcer_daemon.kube.client._REFRESH_AFTER_S", 0.05)
    api.token = "second"  # noqa: S105 - no secret
    settings = settings_for(api, tmp_path)

    async def work() -> None:
        async with running(settings) as found:
            await found.until(lambda: "HTTP 401" in found.source.problem())
            await asyncio.to_thread(api.write_kubeconfig, tmp_path / "kubeconfig", "second")
            await found.until(lambda: found.source.is_settled)

    asyncio.run(work())


def test_the_last_state_is_written_when_the_source_ends(api: FakeApi, tmp_path: Path) -> None:
    settings = settings_for(api, tmp_path)
    limits = replace(LIMITS, save_interval_s=3600.0)
    api.put(policy("p0"))

    async def work() -> None:
        async with running(settings, limits) as found:
            await found.until(lambda: found.policies == ["p0"])
            await asyncio.to_thread(api.put, policy("p1"))
            await found.until(lambda: found.policies == ["p0", "p1"])

    asyncio.run(work())
    assert "p1" in (settings.state_dir / "cluster" / "networkpolicies.jsonl").read_text()


def test_a_start_without_the_server_goes_on_with_what_was_kept(api: FakeApi, tmp_path: Path) -> None:
    api.put(policy("p0"), namespace("x", team="red"), pod("web"))
    settings = settings_for(api, tmp_path)

    async def first() -> ClusterState:
        async with running(settings) as found:
            await found.until(lambda: found.source.is_settled)
            await found.source.keep()
            return found.states[-1]

    async def second(before: ClusterState) -> None:
        with api.away():
            started = time.monotonic()
            async with running(settings) as found:
                await found.until(lambda: found.source.is_settled)
                assert time.monotonic() - started >= LIMITS.sync_timeout_s
                assert found.states == [before]
                assert found.source.networks().enforced
                assert found.source.lag()
                await asyncio.to_thread(api.delete, "NetworkPolicy", "x", "p0")
                await found.source.keep()  # What is not known to be complete is not written over.
        async with running(settings) as found:
            await found.until(lambda: bool(found.states))
            await found.until(lambda: found.policies == [])

    before = asyncio.run(first())
    asyncio.run(second(before))


def test_a_start_with_neither_waits_for_the_server(api: FakeApi, tmp_path: Path) -> None:
    settings = settings_for(api, tmp_path)

    async def work() -> None:
        with api.away():
            async with running(settings) as found:
                await found.until(lambda: "does not answer" in found.source.problem())
                await asyncio.sleep(2 * LIMITS.sync_timeout_s)
                assert found.states == []
        async with running(settings) as found:
            await found.until(lambda: found.source.is_settled)

    asyncio.run(work())


def test_credentials_that_cannot_be_used_are_a_setting_at_fault(api: FakeApi, tmp_path: Path) -> None:
    settings = settings_for(api, tmp_path)
    for content in ("{]", "{}", "clusters: 7", ""):
        (tmp_path / "kubeconfig").write_text(content)
        with pytest.raises(SettingsError, match=r"kubernetes\.kubeconfig"):
            asyncio.run(ClusterSource(settings, structlog.get_logger(), Metrics()).open())
    outside = replace(settings, kubernetes=replace(settings.kubernetes, kubeconfig=None))
    with pytest.raises(SettingsError, match=r"kubernetes\.kubeconfig"):
        asyncio.run(ClusterSource(outside, structlog.get_logger(), Metrics()).open())


# Registration.


def request(name: str = "web", uid: str = "u-1") -> AddRequest:
    return AddRequest(
        AttachmentId("c", "eth0"), "/run/netns/x", "n", PodRef("x", name), uid, {"not": "used"}, (), (), None
    )


async def admit(found: Running, wanted: AddRequest) -> AddRequest | RegistrationError:
    try:
        return await Admission(found.source, "a", 2.0).admit(wanted)
    except RegistrationError as err:
        return err


def test_a_known_pod_is_admitted_with_its_own_labels_also_without_the_server(api: FakeApi, tmp_path: Path) -> None:
    mirror = {"kubernetes.io/config.hash": HASH, "kubernetes.io/config.mirror": HASH}
    api.put(pod("web"), pod("static", annotations=mirror))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            with api.away():
                for wanted in (request(), request("static", HASH)):
                    answer = await admit(found, wanted)
                    assert isinstance(answer, AddRequest)
                    assert answer.labels == {"app": wanted.pod.name}
        assert not any(path.startswith("/api/v1/namespaces/x/pods/") for _, path in api.requests)

    asyncio.run(work())


def test_a_pod_that_the_watch_has_not_brought_is_asked_for(api: FakeApi, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: "pods" in api.watched())
            api.objects.listeners.clear()  # The watches are deaf from here on.
            await asyncio.to_thread(api.put, pod("web"))
            answer = await admit(found, request())
            assert isinstance(answer, AddRequest)
            assert found.states[-1].find_pod(PodRef("x", "web"), "u-1") is not None

    asyncio.run(work())


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_pod_waits_for_what_its_namespace_had_before_it(api: FakeApi, tmp_path: Path, is_kept: bool) -> None:
    """Its labels are new, one policy too, and one is gone; the watches have brought the pod alone."""
    api.put(namespace("x", team="red"), policy("old"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: {"pods", "namespaces", "networkpolicies"} <= set(api.watched()))
            await found.until(lambda: found.policies == ["old"])
            api.objects.listeners.clear()  # The watches are deaf from here on.
            await asyncio.to_thread(api.put, namespace("x", team="blue"), policy("isolates"))
            await asyncio.to_thread(api.delete, "NetworkPolicy", "x", "old")
            await asyncio.to_thread(api.put, pod("web"))
            if is_kept:  # The pods' watch was no slower.
                found.source.pods.add(api.get("Pod", "x", "web"))
            assert isinstance(await admit(found, request()), AddRequest)
            assert found.policies == ["isolates"]
            assert found.states[-1].labels_of("x")["team"] == "blue"
            asked = sum("/namespaces/x/networkpolicies" in path for _, path in api.requests)
            assert isinstance(await admit(found, request()), AddRequest)
            assert asked == sum("/namespaces/x/networkpolicies" in path for _, path in api.requests) == 1

    asyncio.run(work())


def test_a_pod_is_not_admitted_before_its_namespace_can_be_asked_for(api: FakeApi, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: {"pods", "namespaces", "networkpolicies"} <= set(api.watched()))
            api.objects.listeners.clear()
            await asyncio.to_thread(api.put, pod("web"))
            found.source.pods.add(api.get("Pod", "x", "web"))
            api.faults = lambda asked: 503 if "networkpolicies" in asked.path else None
            answer = await admit(found, request())
            assert isinstance(answer, RegistrationError)
            assert (answer.code, answer.retryable) == (messages.TRY_AGAIN, True)
            assert "may be older than it" in answer.message

    asyncio.run(work())


def test_a_namespace_that_the_watches_have_brought_is_not_asked_for(api: FakeApi, tmp_path: Path) -> None:
    api.put(namespace("x"), policy("p"), pod("web"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            assert isinstance(await admit(found, request()), AddRequest)
        assert not any("/namespaces/x" in path for _, path in api.requests)

    asyncio.run(work())


def test_a_cluster_from_a_backup_is_listed_again(api: FakeApi, tmp_path: Path) -> None:
    """Its versions have gone back, so a watch from where it was would be told nothing for long."""
    api.put(*(policy(f"p{number}") for number in range(9)))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: len(found.policies) == 9 and "networkpolicies" in api.watched())
            with api.away():
                api.objects.restore(int(api.get("NetworkPolicy", "x", "p2")["metadata"]["resourceVersion"]))
            await found.until(lambda: found.policies == ["p0", "p1", "p2"])
            await asyncio.to_thread(api.put, policy("later"))
            await found.until(lambda: "later" in found.policies)

    asyncio.run(work())


ENDING = pod("web", deletionTimestamp="2026-01-01T00:00:00Z")
REFUSED = {
    "gone": (None, request(), messages.POD_GONE, "is gone"),
    "replaced": (pod("web", uid="u-2"), request(), messages.POD_GONE, "u-2"),
    "elsewhere": (pod("web", node="b"), request(), messages.FAILED, "on node b"),
    "no uid, gone": (None, request(uid=""), messages.POD_GONE, "is gone"),
    "no uid, elsewhere": (pod("web", node="b"), request(uid=""), messages.FAILED, "on node b"),
    "no uid, ending": (
        pod("web", deletionTimestamp="2026-01-01T00:00:00Z"),
        request(uid=""),
        messages.TRY_AGAIN,
        "being",
    ),
    "no mirror yet": (None, request(uid=HASH), messages.TRY_AGAIN, "mirror"),
    "mirror of another version": (pod("web"), request(uid=HASH), messages.TRY_AGAIN, "another version"),
    "unreadable": (pod("web", labels={"a b": ""}), request(), messages.TRY_AGAIN, "metadata.labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(api: FakeApi, tmp_path: Path, case: str) -> None:
    manifest, wanted, code, words = REFUSED[case]

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            if manifest is not None:
                await asyncio.to_thread(api.put, manifest)
            answer = await admit(found, wanted)
            assert isinstance(answer, RegistrationError)
            assert (answer.code, answer.retryable) == (code, code == messages.TRY_AGAIN)
            assert words in answer.message

    asyncio.run(work())


def test_a_pod_without_a_uid_from_its_runtime_is_asked_for(api: FakeApi, tmp_path: Path) -> None:
    """What the watch knows may be the pod that had the name before."""
    api.put(pod("web"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(
                lambda: "pods" in api.watched() and found.source.find(PodRef("x", "web"), "u-1") is not None
            )
            api.objects.listeners.clear()  # The watches are deaf from here on.
            await asyncio.to_thread(api.delete, "Pod", "x", "web")
            await asyncio.to_thread(api.put, pod("web", uid="u-2", labels={"app": "next"}))
            answer = await admit(found, request(uid=""))
            assert isinstance(answer, AddRequest)
            assert (answer.uid, answer.labels) == ("u-2", {"app": "next"})
            with api.away():
                refused = await admit(found, request(uid=""))
                assert isinstance(refused, RegistrationError)
                assert refused.retryable

    asyncio.run(work())


def test_an_unknown_pod_is_to_be_tried_again_while_the_server_is_away(api: FakeApi, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            with api.away():
                answer = await admit(found, request())
                assert isinstance(answer, RegistrationError)
                assert (answer.code, answer.retryable) == (messages.TRY_AGAIN, True)
                assert "does not answer" in answer.message

    asyncio.run(work())


def test_nothing_is_admitted_without_networks_of_the_node(api: FakeApi, tmp_path: Path) -> None:
    api.put({**NODE, "spec": {}}, pod("web"))

    async def work() -> None:
        async with running(settings_for(api, tmp_path)) as found:
            await found.until(lambda: found.source.is_settled)
            answer = await admit(found, request())
            assert isinstance(answer, RegistrationError)
            assert (answer.code, answer.retryable) == (messages.TRY_AGAIN, True)
            assert "podCIDRs" in answer.message
            await asyncio.to_thread(api.put, NODE)
            await found.until(lambda: found.source.problem() == "")
            assert isinstance(await admit(found, request()), AddRequest)

    asyncio.run(work())
