# SPDX-License-Identifier: Apache-2.0
"""Whatever a primary writes, whenever an installer dies: one entry of ours at most, nothing lost, nothing broken."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trireme_install.errors import UnreadableFileError
from trireme_install.netd import Listing, Loaded, Runtime, decode_file, decode_json, encode_json, is_own, load
from trireme_install.plan import (
    COPY_OF,
    OWNED_NAME,
    Mode,
    Outcome,
    Wanted,
    apply_step,
    plan_install,
    plan_removal,
)

FILES = ("10-calico.conflist", "10-flannel.conflist", "87-last.conflist")
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_plugins = st.lists(
    st.builds(
        lambda kind, extra: {**extra, "type": kind},
        st.sampled_from(["bridge", "calico", "portmap", "trireme"]),
        st.dictionaries(st.sampled_from(["mtu", "ipam", "x"]), _json, max_size=2),
    ),
    min_size=1,
    max_size=4,
)
_networks = st.builds(
    lambda extra, name, version, plugins: {**extra, "name": name, "cniVersion": version, "plugins": plugins},
    st.dictionaries(st.sampled_from(["dns", "other", "disableCheck"]), _json, max_size=2),
    st.sampled_from(["k8s-pod-network", "cbr0"]),
    st.sampled_from(["0.3.1", "1.0.0", "1.1.0"]),
    _plugins,
)
_contents = st.one_of(
    _networks.map(lambda tree: json.dumps(tree).encode()),
    _networks.map(lambda tree: json.dumps(tree).encode()[:-7]),  # in the middle of a writing
)
_events = st.lists(
    st.one_of(
        st.tuples(st.just("primary writes"), st.sampled_from(FILES), _contents),
        st.tuples(st.just("primary removes"), st.sampled_from(FILES), st.just(b"")),
        st.tuples(st.just("installer"), st.sampled_from(list(Mode)), st.integers(0, 4)),
    ),
    max_size=8,
)


def reads_drop_ins(mode: Mode) -> bool:
    return mode is Mode.DROP_IN


def foreign(listing: Listing) -> dict[str, object]:
    """All that is not ours: every file's tree without our entries."""
    trees: dict[str, object] = {}
    for name, data in listing.files.items():
        try:
            network = decode_file(name, data)
        except UnreadableFileError:
            trees[name] = data
            continue
        if COPY_OF not in network.tree:
            trees[name] = {**network.tree, "plugins": [plugin for plugin in network.plugins if not is_own(plugin)]}
    return trees


def loaded(listing: Listing) -> Loaded:
    return load(listing, Runtime.CONTAINERD, reads_drop_ins=True)


@given(_events, st.sampled_from(list(Mode)))
def test_any_history_ends_in_one_entry_and_loses_nothing(events: list[tuple[str, Any, Any]], last: Mode) -> None:
    listing = Listing()
    for what, subject, detail in events:
        if what == "primary writes":
            listing = Listing({**listing.files, subject: detail}, listing.drop_ins)
        elif what == "primary removes":
            rest = {name: data for name, data in listing.files.items() if name != subject}
            listing = Listing(rest, listing.drop_ins)
        else:
            before = foreign(listing)
            first = loaded(listing)
            for step in plan_install(listing, Wanted(subject)).steps[:detail]:  # killed after some steps
                listing = apply_step(listing, step)
                assert foreign(listing) == before
                now = loaded(listing)
                assert not now.unreadable or first.unreadable  # never an invalid file as the first
                if first.own_entries:
                    assert now.own_entries >= 1  # never a protected node unprotected by us
                assert now.own_entries <= first.own_entries + 1  # the new one, before the old ones go
    before = foreign(listing)
    plan = plan_install(listing, Wanted(last))
    for step in plan.steps:
        listing = apply_step(listing, step)
    assert foreign(listing) == before
    assert plan_install(listing, Wanted(last)).steps == ()
    if plan.outcome is Outcome.INSTALLED:
        assert loaded(listing).own_entries == 1
        assert not is_own(loaded(listing).chain[0])


@given(st.dictionaries(st.sampled_from(FILES), _contents), st.sampled_from(list(Mode)))
def test_removal_leaves_nothing_of_ours_in_any_list(files: dict[str, bytes], mode: Mode) -> None:
    listing = Listing(files)
    before = foreign(listing)
    for step in plan_install(listing, Wanted(mode)).steps:
        listing = apply_step(listing, step)
    removal = plan_removal(listing)
    for step in removal.steps:
        listing = apply_step(listing, step)
    assert foreign(listing) == before
    assert listing.drop_ins == {}
    assert OWNED_NAME not in listing.files
    if removal.outcome is Outcome.INSTALLED:
        assert loaded(listing).own_entries == 0


@given(_contents, _contents, st.sampled_from(list(Mode)))
def test_what_a_primary_writes_in_between_is_not_overwritten(first: bytes, then: bytes, mode: Mode) -> None:
    steps = plan_install(Listing({FILES[0]: first}), Wanted(mode)).steps
    listing = Listing({FILES[0]: then})
    for step in steps:
        listing = apply_step(listing, step)
    if first != then:
        assert listing.files[FILES[0]] == then


@given(st.sampled_from(["10-a.conflist", "10-a.conf"]), st.binary(max_size=60))
def test_any_bytes_are_a_network_or_unreadable(name: str, data: bytes) -> None:
    try:
        decode_file(name, data)
    except UnreadableFileError:
        assert plan_install(Listing({name: data}), Wanted()).steps == ()


@given(st.dictionaries(st.text(max_size=5), _json, max_size=4))
def test_what_is_read_is_written_back_as_it_was(tree: dict[str, Any]) -> None:
    assert decode_json(encode_json(tree)) == tree
