# SPDX-License-Identifier: Apache-2.0
"""Who waits for a look-up behind whom, and who gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.handshake.claims import Claim
from enforcer_daemon.handshake.lookups import (
    MAX_WAITING,
    MAX_WAITING_OF_NAMESPACE,
    MAX_WAITING_OF_NODE,
    Admission,
    LookupQueue,
)
from enforcer_daemon.model import PodRef


def claim(node: str, namespace: str, name: str = "p") -> Claim:
    return Claim(node, PodRef(namespace, name), "u")


def names(queue: LookupQueue) -> list[str]:
    return [f"{found.node}/{found.pod.namespace}/{found.pod.name}" for found in iter(queue.take, None)]


def fill(queue: LookupQueue, node: str, namespace: str, count: int) -> list[Admission]:
    return [queue.put(claim(node, namespace, f"p{number}")).admission for number in range(count)]


def test_nodes_and_namespaces_take_turns() -> None:
    queue = LookupQueue()
    fill(queue, "b", "x", 3)
    fill(queue, "b", "y", 1)
    fill(queue, "c", "x", 2)
    assert names(queue) == ["b/x/p0", "c/x/p0", "b/y/p0", "c/x/p1", "b/x/p1", "b/x/p2"]
    assert (len(queue), queue.take()) == (0, None)


def test_a_namespace_fills_its_own_share_of_its_node() -> None:
    queue = LookupQueue()
    assert fill(queue, "b", "x", MAX_WAITING_OF_NAMESPACE + 1)[-1] is Admission.SHARE_IS_FULL
    assert fill(queue, "b", "y", 1) == [Admission.TAKEN]
    assert fill(queue, "c", "x", 1) == [Admission.TAKEN]


def test_a_node_fills_its_own_share_and_its_namespaces_share_that() -> None:
    queue = LookupQueue()
    fill(queue, "b", "x", MAX_WAITING_OF_NAMESPACE)
    fill(queue, "b", "y", MAX_WAITING_OF_NODE - MAX_WAITING_OF_NAMESPACE)
    assert fill(queue, "b", "x", 1) == [Admission.SHARE_IS_FULL]
    admission, evicted = queue.put(claim("b", "z"))
    assert (admission, evicted is not None and evicted.pod.namespace in ("x", "y")) == (Admission.TAKEN, True)
    assert len(queue) == MAX_WAITING_OF_NODE


def test_names_that_are_made_up_push_out_their_own_kind_and_no_more_than_are_looked_up() -> None:
    """With a namespace for each claim, a full share has one of each, and the next finds nobody that has more."""
    queue = LookupQueue()
    for number in range(MAX_WAITING_OF_NODE):
        assert queue.put(claim("b", f"n{number}")).admission is Admission.TAKEN
    for number in range(100):
        assert queue.put(claim("b", f"other-{number}")) == (Admission.SHARE_IS_FULL, None)


def test_where_the_whole_queue_is_full_whoever_has_most_gives_way() -> None:
    queue = LookupQueue()
    for node in range(MAX_WAITING // MAX_WAITING_OF_NODE):
        for namespace in range(4):
            fill(queue, f"n{node}", f"x{namespace}", MAX_WAITING_OF_NODE // 4)
    assert len(queue) == MAX_WAITING
    admission, evicted = queue.put(claim("c", "x"))
    assert admission is Admission.TAKEN
    assert evicted is not None
    assert evicted.node.startswith("n")
    assert len(queue) == MAX_WAITING


def test_where_all_have_the_same_the_newcomer_is_not_taken() -> None:
    queue = LookupQueue()
    for number in range(MAX_WAITING):
        assert queue.put(claim(f"n{number}", "x")).admission is Admission.TAKEN
    assert queue.put(claim("late", "x")) == (Admission.QUEUE_IS_FULL, None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.booleans())))
def test_what_is_put_in_is_taken_out_once(steps: list[tuple[str, str, bool]]) -> None:
    queue, waiting = LookupQueue(), []
    for number, (node, namespace, is_put) in enumerate(steps):
        if is_put:
            waiting.append(claim(node, namespace, f"p{number}"))
            assert queue.put(waiting[-1]) == (Admission.TAKEN, None)
        elif waiting:
            found = queue.take()
            assert found is not None
            waiting.remove(found)
        assert len(queue) == len(waiting)
