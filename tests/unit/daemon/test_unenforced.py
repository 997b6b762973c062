# SPDX-License-Identifier: Apache-2.0
"""Pods that have an address, and never registered."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from enforcer_daemon.daemon.unenforced import PATIENCE_S, UnenforcedPods
from enforcer_daemon.model import PodRef
from enforcer_daemon.policy import Pod

PENDING = Pod(PodRef("shop", "web"), {}, uid="u-1")
RUNNING = replace(PENDING, ips=(ip_address("10.1.0.2"),))
WEB = PodRef("shop", "web")


def looked(*pods: Pod, registered: frozenset[tuple[PodRef, str]] = frozenset()) -> tuple[UnenforcedPods, list[Pod]]:
    """Look at each state of one pod, then once the patience is over."""
    told: list[Pod] = []
    unenforced = UnenforcedPods(("kube-system",), told.append)
    for now, pod in enumerate(pods):
        unenforced.look([pod], (), float(now))
    for after in (0.0, 1.0):
        unenforced.look([pods[-1]], registered, len(pods) + PATIENCE_S + after)
    return unenforced, told


def test_a_pod_that_starts_past_the_daemon_is_told_once() -> None:
    unenforced, told = looked(PENDING, RUNNING)
    assert (unenforced.passed, unenforced.earlier, told) == ([WEB], [], [RUNNING])


def test_a_pod_that_ran_before_is_told_apart() -> None:
    unenforced, told = looked(RUNNING)
    assert (unenforced.passed, unenforced.earlier, told) == ([], [WEB], [])


def test_a_registered_pod_is_none() -> None:
    unenforced, told = looked(PENDING, RUNNING, registered=frozenset({(WEB, "u-1")}))
    assert (unenforced.passed, unenforced.earlier, told) == ([], [], [])


def test_the_registration_of_an_earlier_pod_of_the_name_does_not_count() -> None:
    unenforced, _ = looked(PENDING, RUNNING, registered=frozenset({(WEB, "u-0")}))
    assert unenforced.passed == [WEB]


@pytest.mark.parametrize(
    "pod",
    [
        PENDING,
        replace(RUNNING, is_on_host_network=True),
        replace(RUNNING, is_finished=True),
        replace(RUNNING, ref=PodRef("kube-system", "dns")),
    ],
)
def test_pods_that_need_no_enforcer_are_none(pod: Pod) -> None:
    unenforced, _ = looked(replace(pod, ips=()), pod)
    assert (unenforced.passed, unenforced.earlier) == ([], [])


def test_a_pod_has_time_to_register() -> None:
    unenforced = UnenforcedPods(())
    unenforced.look([RUNNING], (), 0.0)
    unenforced.look([RUNNING], (), PATIENCE_S - 1)
    assert unenforced.earlier == []
