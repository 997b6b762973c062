# SPDX-License-Identifier: Apache-2.0
"""Tables that are shared fairly: who makes room, whatever is done to them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.handshake.fairtable import FairTable, source_of

A, B, C = b"a", b"b", b"c"


def filled(table: FairTable[int, int], source: bytes, *keys: int) -> list[int]:
    """Put entries; answer those that made room."""
    evicted = [table.put(key, key, source) for key in keys]
    return [gone.value for gone in evicted if gone is not None]


def test_a_source_at_its_own_bound_gives_up_its_oldest() -> None:
    table: FairTable[int, int] = FairTable(10, 2)
    assert filled(table, A, 1, 2) == []
    assert filled(table, B, 3) == []
    assert table.put(4, 4, A) == (1, True)
    assert list(table) == [2, 3, 4]


def test_in_a_full_table_the_greediest_makes_room_for_a_newcomer() -> None:
    table: FairTable[int, int] = FairTable(4, 4)
    filled(table, A, 1, 2, 3)
    filled(table, B, 4)
    assert table.put(5, 5, C) == (1, False)
    assert table.put(6, 6, B) == (2, False)
    assert [table.count(source) for source in (A, B, C)] == [1, 2, 1]
    assert table.put(7, 7, B) == (4, False)  # It is the greediest itself now.


def test_among_many_with_one_entry_each_the_oldest_makes_room() -> None:
    table: FairTable[int, int] = FairTable(3, 3)
    for n in range(3):
        filled(table, b"%d" % n, n)
    assert filled(table, b"new", 9) == [0]


def test_an_entry_of_the_same_key_is_replaced_and_costs_nobody_anything() -> None:
    table: FairTable[int, int] = FairTable(2, 2)
    filled(table, A, 1, 2)
    assert table.put(1, 10, B) is None
    assert (table.get(1), table.get(7), list(table)) == (10, None, [2, 10])
    assert table.pop(7) is None


def test_hosts_of_ipv6_choose_their_addresses_and_pods_do_not() -> None:
    v4, v6 = bytes((10, 0, 0, 1)), bytes(range(16))
    assert source_of(v4, is_pod=False) == source_of(v4, is_pod=True) == v4
    assert source_of(v6, is_pod=True) == v6
    assert source_of(v6, is_pod=False) == v6[:8]


OPERATIONS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 12), st.sampled_from([b"a", b"b", b"c", b"d"])), max_size=60
)


@given(st.integers(1, 6), st.integers(1, 6), OPERATIONS)
def test_no_order_of_events_breaks_the_bounds(
    total: int, per_source: int, operations: list[tuple[bool, int, bytes]]
) -> None:
    """Against a plain list of (key, source), oldest first."""
    table: FairTable[int, int] = FairTable(total, per_source)
    model: list[tuple[int, bytes]] = []
    for is_put, key, source in operations:
        before = {other: sum(1 for _, owner in model if owner == other) for _, other in model}
        model = [entry for entry in model if entry[0] != key]
        if not is_put:
            table.pop(key)
        else:
            had = {other: sum(1 for _, owner in model if owner == other) for _, other in model}
            evicted = table.put(key, key, source)
            must_evict = len(model) >= total or had.get(source, 0) >= per_source
            assert (evicted is not None) == must_evict
            if evicted is not None:
                (owner,) = (owner for kept, owner in model if kept == evicted.value)
                assert owner == source if had.get(source, 0) >= per_source else had[owner] == max(had.values())
                assert evicted.value == next(kept for kept, other in model if other == owner), before
                model = [entry for entry in model if entry[0] != evicted.value]
            model.append((key, source))
        assert list(table) == [kept for kept, _ in model]
        assert len(table) <= total
        assert all(table.count(other) == sum(1 for _, owner in model if owner == other) for other in (A, B, C))
