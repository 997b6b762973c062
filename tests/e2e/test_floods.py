# SPDX-License-Identifier: Apache-2.0
"""Floods from a pod, at the highest rate of one core: others get through, limits hold, and nothing of it stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from benchmarks import flood_packets
from benchmarks.flood_packets import FLOODS, Flood
from benchmarks.floods import WORLD, connect, flooding, record, shares, start_servers
from benchmarks.shares import SharesError, WeighedLab
from enforcer_daemon.daemon.limits import DaemonLimits
from enforcer_daemon.dataplane.queue import QueueSizes
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.model import PodRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DataplaneSettings
from tests.e2e.attackers import counters_of, endpoint_of, grow_old
from tests.e2e.operation_world import endpoint, queue_fields
from trireme_lab import Lab, LabSpec, PodSpec, Tools
from trireme_lab.enforcer import enforcer_with

pytestmark = pytest.mark.kernel

PER_SOURCE = 300
LIMITS = DaemonLimits(
    handshake=HandshakeLimits(timeout_s=2.0, max_half_open_flows_per_source=PER_SOURCE, max_verifications_per_s=50.0),
    queue=QueueSizes(length=512),
)
"""Limits that a second of flood reaches on any machine, and handshakes that are forgotten soon."""
VICTIM = "bench/victim"
_PATIENCE_S = 30.0
_LEAST_SHARE = 0.7
"""What the honest pair must keep of its rate without a flood; `make bench` measures more exactly what it keeps."""
_MORE_MEMORY_BYTES = 96 << 20
REASONS: dict[Flood, Reason] = {
    flood_packets.plain_syns: Reason.UNIDENTIFIED_PEER,
    flood_packets.garbage_frames: Reason.FRAME_VERSION,
    flood_packets.bad_credentials: Reason.VERIFY_RATE,
    flood_packets.bad_signatures: Reason.VERIFY_RATE,
    flood_packets.replays: Reason.REPLAYED_NONCE,
    flood_packets.half_open: Reason.FLOW_TABLE_FULL,
    flood_packets.token_churn: Reason.VERIFY_RATE,
    flood_packets.unknown_acks: Reason.UNKNOWN_FLOW,
    flood_packets.unknown_data: Reason.UNKNOWN_FLOW,
    flood_packets.datagrams: Reason.UNIDENTIFIED_PEER,
}


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    friend = PodSpec(PodRef("bench", "friend"), "a", {"role": "flooder"})  # Admitted by the victim, and honest.
    world = LabSpec(WORLD.nodes, pods=(*WORLD.pods, friend), manifests=WORLD.manifests)
    tools = Tools(plugin=plugin, enforcer=enforcer_with(LIMITS))
    with ExitStack() as stack:
        lab = Lab(world, tools)
        with suppress(SharesError):
            lab = WeighedLab(world, stack.enter_context(shares()), tools)
        stack.enter_context(lab)
        start_servers(lab)
        connect(lab, 200)
        grow_old(lab)  # The guard lets no new pod send datagrams of no flow: they would meet no enforcer.
        yield lab


def await_condition(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def memory_bytes(lab: Lab) -> int:
    """Return the resident memory of the daemon."""
    status = Path(f"/proc/{lab.node('a').daemon.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def limit_hits(lab: Lab) -> Mapping[str, int]:
    hits = lab.node("a").status()["limits_reached"]
    assert isinstance(hits, dict)
    return hits


def lost_packets(lab: Lab, where: str) -> int:
    lost = endpoint(lab, VICTIM)["lost_packets"]
    assert isinstance(lost, dict)
    return int(lost[where])


def is_at_rest(lab: Lab) -> bool:
    """Return whether nothing is left of any handshake, in the daemon and in the victim's queue."""
    waiting = queue_fields(lab, VICTIM)[2]
    tables = [(found["half_open_flows"], found["held_packets"]) for found in lab.node("a").endpoints()]
    return waiting == "0" and set(tables) == {(0, 0)}


def test_honest_load_meets_no_rate(lab: Lab) -> None:
    """Clients that reset as soon as they are connected: of each connection three packets are queued at each end.

    As many connections as their SYNs have leave for, for some seconds, however fast the machine is.
    """
    syns_per_s, connections = DataplaneSettings().syn_rate_limit_per_source, 2_000
    for _ in range(8):
        started = time.monotonic()
        connect(lab, connections)
        time.sleep(max(0.0, started + connections / syns_per_s - time.monotonic()))
    for pod in ("bench/client", "bench/server"):
        assert endpoint(lab, pod)["lost_packets"] == {"queue": 0, "buffer": 0, "limit": 0}


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_flood_is_counted_and_leaves_nothing_behind(lab: Lab, flood: Flood) -> None:
    frames, pid, reason = record(lab, flood), lab.node("a").daemon.pid, REASONS[flood].value
    seen, memory = counters_of(lab, VICTIM).get(reason, 0), memory_bytes(lab)
    with flooding(lab, frames):
        connect(lab, 80)  # All of them succeed.
        await_condition(lambda: counters_of(lab, VICTIM).get(reason, 0) > seen, f"nothing dropped for {reason}")
        open_flows = endpoint_of(lab, VICTIM)["half_open_flows"]
        assert isinstance(open_flows, int)
        assert open_flows <= PER_SOURCE
    await_condition(lambda: is_at_rest(lab), "handshakes or packets are left")
    assert lab.node("a").daemon.pid == pid
    assert lab.node("a").daemon.exit_status is None
    assert memory_bytes(lab) - memory < _MORE_MEMORY_BYTES
    connect(lab, 80)
    for admitted in ("bench/friend", "bench/flooder"):
        connect(lab, 8, 1, pair=(admitted, VICTIM))


def test_who_floods_reaches_his_own_bounds(lab: Lab) -> None:
    before, lost = limit_hits(lab), lost_packets(lab, "limit")
    for flood, bound in (
        (flood_packets.half_open, Limit.HALF_OPEN_FLOWS_PER_SOURCE),
        (flood_packets.bad_signatures, Limit.VERIFICATIONS_PER_SOURCE),
    ):
        with flooding(lab, record(lab, flood)):
            await_condition(
                lambda bound=bound: limit_hits(lab).get(bound.value, 0) > before.get(bound.value, 0),  # type: ignore[misc]
                f"{bound.value} was not reached",
            )
            await_condition(lambda: lost_packets(lab, "limit") > lost, "the kernel let it come as fast as it was sent")
    metrics = lab.node("a").admin("metrics")
    assert isinstance(metrics, str)
    assert f'trireme_limit_reached_total{{limit="{Limit.HALF_OPEN_FLOWS_PER_SOURCE.value}"}}' in metrics
    for cause in ("queue-full", "buffer-full", "packet-rate"):
        assert f'trireme_queue_dropped_packets_total{{cause="{cause}"}}' in metrics


@pytest.mark.parametrize(
    "flood", [flood_packets.plain_syns, flood_packets.half_open, flood_packets.unknown_data], ids=lambda f: f.__name__
)
def test_another_pair_keeps_its_rate(lab: Lab, flood: Flood) -> None:
    """Beside what is refused by the kernel's rates, what is never ended, and what is answered."""
    if not isinstance(lab, WeighedLab):
        pytest.skip("no cgroups here: a sender is the equal of the enforcer whatever it sends")
    frames = record(lab, flood)
    kept: list[float] = []
    deadline = time.monotonic() + _PATIENCE_S
    while not kept or (max(kept) < _LEAST_SHARE and time.monotonic() < deadline):
        await_condition(lambda: is_at_rest(lab), "handshakes or packets are left")
        quiet = connect(lab, 320)["per_s"]
        with flooding(lab, frames):
            kept.append(connect(lab, 320)["per_s"] / quiet)
    assert max(kept) >= _LEAST_SHARE, kept


def test_latency_is_as_before_when_a_flood_is_over(lab: Lab) -> None:
    def best_us() -> float:
        return min(connect(lab, 40, 1)["p50_us"] for _ in range(3))

    before = best_us()
    with flooding(lab, record(lab, flood_packets.token_churn)):
        connect(lab, 80)
    await_condition(lambda: is_at_rest(lab), "handshakes or packets are left")
    await_condition(lambda: best_us() < 3 * before, f"connect() took {before:.0f} us before the flood, and more now")
