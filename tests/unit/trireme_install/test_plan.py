# SPDX-License-Identifier: Apache-2.0
"""What the installer changes in net.d: each mode on the layouts of real primaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import spec
from trireme_install.netd import Listing, Runtime, load
from trireme_install.plan import (
    COPY_OF,
    DROP_IN_NAME,
    MARK,
    OWNED_NAME,
    SUPPORTED_VERSIONS,
    Mode,
    Outcome,
    Plan,
    Remove,
    Replace,
    Wanted,
    Write,
    apply_step,
    plan_install,
    plan_removal,
)

VECTORS = Path(__file__).parents[2] / "vectors" / "netd"
CALICO, FLANNEL, MULTUS, BARE = "10-calico.conflist", "10-flannel.conflist", "00-multus.conf", "87-bare.conf"


def listing(*names: str, **others: bytes) -> Listing:
    return Listing({**{name: (VECTORS / name).read_bytes() for name in names}, **others})


def after(start: Listing, plan: Plan) -> Listing:
    for step in plan.steps:
        start = apply_step(start, step)
    return start


def installed(start: Listing, mode: Mode = Mode.MERGE) -> Listing:
    plan = plan_install(start, Wanted(mode))
    assert plan.outcome is Outcome.INSTALLED, plan.message
    return after(start, plan)


REPORTED = Listing({
    "10-crio-bridge.conflist": b'{"cniVersion":"1.0.0","name":"crio","plugins":[{"type":"bridge"}]}',
    "20-flannel.conflist": b'{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}',
})  # fmt: skip
"""CRI-O is told to use cbr0."""


@pytest.mark.parametrize("mode", Mode)
def test_the_entry_goes_into_the_network_that_the_runtime_is_told(mode: Mode) -> None:
    plan = plan_install(REPORTED, Wanted(mode), network_name="cbr0")
    assert (plan.outcome, plan.message) == (
        Outcome.INSTALLED, f"20-flannel.conflist: network cbr0 has our plugin ({mode.value})"
    )  # fmt: skip
    found = load(after(REPORTED, plan), Runtime.CRIO, reads_drop_ins=True, network_name="cbr0")
    assert [plugin["type"] for plugin in found.chain] == ["flannel", "portmap", "trireme"]
    assert after(REPORTED, plan).files["10-crio-bridge.conflist"] == REPORTED.files["10-crio-bridge.conflist"]


def test_a_network_that_nothing_configures_is_waited_for() -> None:
    plan = plan_install(REPORTED, Wanted(), network_name="ovn")
    assert (plan.outcome, plan.steps) == (Outcome.WAITING, ())
    assert "'ovn' (cni_default_network)" in plan.message


def test_the_entry_moves_when_the_runtime_is_told_another_network() -> None:
    before = after(REPORTED, plan_install(REPORTED, Wanted()))
    moved = after(before, plan_install(before, Wanted(), network_name="cbr0"))
    assert "trireme" not in moved.files["10-crio-bridge.conflist"].decode()
    assert "trireme" in moved.files["20-flannel.conflist"].decode()


def test_what_cannot_be_read_is_passed_over_for_a_named_network() -> None:
    broken = Listing({**REPORTED.files, "00-broken.conflist": b"{"})
    assert plan_install(broken, Wanted(), network_name="cbr0").outcome is Outcome.INSTALLED
    assert plan_install(broken, Wanted()).outcome is Outcome.WAITING


def tree(where: Listing, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(where.files[name])
    return found


def types(where: Listing) -> list[str]:
    return [plugin["type"] for plugin in load(where, Runtime.CONTAINERD, reads_drop_ins=True).chain]


def test_the_installer_knows_the_versions_that_the_plugin_speaks() -> None:
    assert SUPPORTED_VERSIONS == spec.SUPPORTED_VERSIONS


@pytest.mark.parametrize("primary", [CALICO, FLANNEL])
def test_merge_appends_one_entry_and_keeps_every_key_of_the_primary(primary: str) -> None:
    before = tree(listing(primary), primary)
    merged = tree(installed(listing(primary)), primary)
    assert merged.pop("plugins") == [*before.pop("plugins"), {"type": "trireme", MARK: "merge"}]
    assert merged == before  # cniVersion too


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("primary", [CALICO, FLANNEL])
def test_a_second_run_changes_nothing(primary: str, mode: Mode) -> None:
    once = installed(listing(primary), mode)
    assert plan_install(once, Wanted(mode)).steps == ()
    assert types(once)[-1] == "trireme"
    assert types(once).count("trireme") == 1


def test_the_settings_are_in_the_entry_and_a_change_of_them_replaces_it() -> None:
    once = installed(listing(FLANNEL))
    plan = plan_install(once, Wanted(settings={"runDir": "/run/other"}))
    entry = tree(after(once, plan), FLANNEL)["plugins"][-1]
    assert entry == {"type": "trireme", "runDir": "/run/other", MARK: "merge"}
    assert types(after(once, plan)) == ["flannel", "portmap", "trireme"]


def test_owned_leaves_the_primary_alone_and_sorts_before_it() -> None:
    start = listing(CALICO)
    once = installed(start, Mode.OWNED)
    assert once.files[CALICO] == start.files[CALICO]
    copy = tree(once, OWNED_NAME)
    assert (copy["name"], copy["cniVersion"], copy[COPY_OF]) == ("k8s-pod-network", "0.3.1", CALICO)
    assert load(once, Runtime.CRIO, reads_drop_ins=False).file == OWNED_NAME


def test_owned_follows_the_primary() -> None:
    once = installed(listing(CALICO), Mode.OWNED)
    changed = {**tree(once, CALICO), "cniVersion": "1.0.0"}
    rewritten = Listing({**once.files, CALICO: json.dumps(changed).encode()})
    assert tree(installed(rewritten, Mode.OWNED), OWNED_NAME)["cniVersion"] == "1.0.0"


def test_owned_stays_while_the_primary_has_no_file_after_a_reboot() -> None:
    once = installed(listing(CALICO), Mode.OWNED)
    rebooted = Listing({OWNED_NAME: once.files[OWNED_NAME]})
    plan = plan_install(rebooted, Wanted(Mode.OWNED))
    assert (plan.outcome, plan.steps) == (Outcome.WAITING, ())


def test_owned_needs_a_name_that_sorts_first() -> None:
    start = Listing({"00-first.conflist": (VECTORS / FLANNEL).read_bytes()})
    plan = plan_install(start, Wanted(Mode.OWNED))
    assert plan.outcome is Outcome.REFUSED
    assert "--owned-name" in plan.message
    assert plan_install(start, Wanted(Mode.OWNED, owned_name="00-a.conflist")).outcome is Outcome.INSTALLED


def test_a_damaged_copy_is_written_anew() -> None:
    start = Listing({**listing(CALICO).files, OWNED_NAME: b"{"})
    assert types(installed(start, Mode.OWNED)) == ["calico", "portmap", "bandwidth", "trireme"]


def test_a_drop_in_is_a_file_of_its_own() -> None:
    start = listing(FLANNEL)
    once = installed(start, Mode.DROP_IN)
    assert once.files == start.files
    assert json.loads(once.drop_ins["cbr0"][DROP_IN_NAME]) == {"type": "trireme", MARK: "drop-in"}


def test_a_list_that_takes_no_drop_ins_is_refused_that_mode() -> None:
    closed = {**tree(listing(FLANNEL), FLANNEL), "loadOnlyInlinedPlugins": True}
    plan = plan_install(Listing({FLANNEL: json.dumps(closed).encode()}), Wanted(Mode.DROP_IN))
    assert (plan.outcome, plan.steps) == (Outcome.REFUSED, ())
    assert "loadOnlyInlinedPlugins" in plan.message


@pytest.mark.parametrize("before", list(Mode))
@pytest.mark.parametrize("mode", list(Mode))
def test_a_change_of_mode_leaves_one_entry_and_is_protected_at_every_step(before: Mode, mode: Mode) -> None:
    state = installed(listing(CALICO), before)
    for step in plan_install(state, Wanted(mode)).steps:
        state = apply_step(state, step)
        assert "trireme" in types(state)
    assert types(state) == ["calico", "portmap", "bandwidth", "trireme"]
    assert plan_install(state, Wanted(mode)).steps == ()
    own = [name for name in state.files if b"trireme" in state.files[name]]
    assert own == {Mode.MERGE: [CALICO], Mode.OWNED: [OWNED_NAME], Mode.DROP_IN: []}[mode]


def test_several_entries_become_one_where_the_first_was() -> None:
    plugins = [{"type": t} for t in ("bridge", "trireme", "istio-cni", "trireme")]
    start = Listing({"10-a.conflist": json.dumps({"name": "a", "cniVersion": "1.0.0", "plugins": plugins}).encode()})
    assert types(installed(start)) == ["bridge", "trireme", "istio-cni"]


def test_an_entry_before_all_others_goes_to_the_end() -> None:
    plugins = [{"type": t} for t in ("trireme", "bridge", "portmap")]
    start = Listing({"10-a.conflist": json.dumps({"name": "a", "cniVersion": "1.0.0", "plugins": plugins}).encode()})
    assert types(installed(start)) == ["bridge", "portmap", "trireme"]


def test_multus_file_is_passed_over() -> None:
    start = listing(MULTUS, FLANNEL)
    once = installed(start)
    assert once.files[MULTUS] == start.files[MULTUS]
    assert [plugin["type"] for plugin in tree(once, FLANNEL)["plugins"]] == ["flannel", "portmap", "trireme"]


def test_a_bare_configuration_is_refused_with_a_word_on_what_to_do() -> None:
    plan = plan_install(listing(BARE), Wanted())
    assert (plan.outcome, plan.steps) == (Outcome.REFUSED, ())
    assert plan.message.startswith(f"{BARE}: a single plugin")
    assert ".conflist" in plan.message


@pytest.mark.parametrize("mode", list(Mode))
def test_a_broken_file_that_sorts_first_is_left_alone(mode: Mode) -> None:
    start = Listing({"05-broken.conflist": b'{"name": "x", "plu', **listing(CALICO).files})
    plan = plan_install(start, Wanted(mode, owned_name="01-trireme.conflist"))
    assert (plan.outcome, plan.steps) == (Outcome.WAITING, ())
    assert "05-broken.conflist" in plan.message


def test_a_file_that_stays_broken_is_passed_over_as_cri_o_does() -> None:
    start = Listing({"05-broken.conflist": b"{", **listing(CALICO).files})
    plan = plan_install(start, Wanted(), ignored=frozenset({"05-broken.conflist"}))
    assert [step.path for step in plan.steps] == [CALICO]


def test_a_primary_of_an_earlier_time_loses_our_entry_and_keeps_an_operators() -> None:
    old = installed(listing(FLANNEL)).files[FLANNEL]
    start = Listing({**listing(CALICO).files, FLANNEL: old})
    once = installed(start)
    assert tree(once, FLANNEL) == tree(listing(FLANNEL), FLANNEL)
    by_hand = {**tree(listing(FLANNEL), FLANNEL), "plugins": [{"type": "bridge"}, {"type": "trireme"}]}
    kept = Listing({**listing(CALICO).files, "20-hand.conflist": json.dumps(by_hand).encode()})
    assert installed(kept).files["20-hand.conflist"] == kept.files["20-hand.conflist"]


@pytest.mark.parametrize("version", [None, "0.2.0", "2.0.0"])
def test_a_version_that_the_plugin_does_not_speak_is_refused(version: str | None) -> None:
    network = {"name": "a", "plugins": [{"type": "bridge"}]} | ({"cniVersion": version} if version else {})
    plan = plan_install(Listing({"10-a.conflist": json.dumps(network).encode()}), Wanted())
    assert (plan.outcome, plan.steps) == (Outcome.REFUSED, ())
    assert "cniVersion" in plan.message


def test_without_a_primary_the_installer_waits() -> None:
    assert plan_install(Listing(), Wanted()).outcome is Outcome.WAITING


def test_a_list_of_nothing_but_us_is_refused() -> None:
    network = {"name": "a", "cniVersion": "1.0.0", "plugins": [{"type": "trireme"}]}
    start = Listing({"10-a.conflist": json.dumps(network).encode()})
    assert plan_install(start, Wanted()).outcome is Outcome.REFUSED
    removal = plan_removal(start)
    assert (removal.outcome, removal.steps) == (Outcome.REFUSED, ())


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("primary", [CALICO, FLANNEL])
def test_removal_gives_the_primary_back_as_it_was(primary: str, mode: Mode) -> None:
    start = listing(primary)
    left = after(installed(start, mode), plan_removal(installed(start, mode)))
    assert tree(left, primary) == tree(start, primary)
    assert set(left.files) == set(start.files)
    assert left.drop_ins == {}
    assert plan_removal(left).steps == ()


def test_the_chain_that_is_shipped_has_our_entry_already() -> None:
    shipped = (Path(__file__).parents[3] / "conf" / "10-trireme.conflist").read_bytes()
    once = installed(Listing({"10-trireme.conflist": shipped}))
    assert types(once) == ["bridge", "portmap", "trireme"]


def test_a_replacement_of_a_file_that_has_changed_does_nothing() -> None:
    start = Listing({"a.conflist": b"new"})
    assert apply_step(start, Replace("a.conflist", b"old", b"ours")) == start
    assert apply_step(start, Remove("a.conflist")) == Listing()
    assert apply_step(Listing(), Write("n/x.conf", b"y")) == Listing({}, {"n": {"x.conf": b"y"}})
