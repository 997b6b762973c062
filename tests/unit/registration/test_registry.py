# SPDX-License-Identifier: Apache-2.0
"""The records of enforced attachments, across restarts and damage."""

from __future__ import annotations

import stat
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId, NetnsId, PodRef
from enforcer_daemon.registration import registry as registry_module
from enforcer_daemon.registration.registry import Record, Registry
from enforcer_daemon.registration.request import AddRequest

RECORD = Record(
    AddRequest(
        attachment=AttachmentId("c1", "eth0"),
        netns_path="/run/netns/x",
        network="pods",
        pod=PodRef("shop", "web-0"),
        uid="u-1",
        labels={"app": "web", "größe": "ß"},
        ips=(ip_address("10.85.0.5"), ip_address("fd85::5")),
        host_interfaces=("veth1",),
        mtu=1450,
    ),
    NetnsId(4, 4026532000),
)


def record(container_id: str, ifname: str = "eth0") -> Record:
    return Record(replace(RECORD.request, attachment=AttachmentId(container_id, ifname)), RECORD.netns)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "endpoints")
    assert registry.load() == ()
    return registry


def reloaded(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "endpoints")
    assert registry.load() == ()
    return registry


def test_records_outlive_the_daemon(tmp_path: Path, registry: Registry) -> None:
    records = [RECORD, record("c1", "eth0.100"), record("c.2")]
    for each in records:
        registry.put(each)
    assert dict(reloaded(tmp_path).records) == {each.attachment: each for each in records}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "endpoints").iterdir()}
    assert modes == {0o600}


def test_a_later_record_takes_the_place_of_an_earlier(tmp_path: Path, registry: Registry) -> None:
    registry.put(RECORD)
    later = replace(RECORD, netns=NetnsId(4, 5))
    registry.put(later)
    assert dict(registry.records) == dict(reloaded(tmp_path).records) == {later.attachment: later}


def test_a_removed_record_is_gone_and_can_be_removed_again(tmp_path: Path, registry: Registry) -> None:
    registry.put(RECORD)
    registry.remove(RECORD.attachment)
    registry.remove(RECORD.attachment)
    assert dict(registry.records) == dict(reloaded(tmp_path).records) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"{}", "version: is missing"),
        (b'{"version": 2}', "version"),
        (registry_module.encode_record(RECORD).replace(b'"inode": 4026532000', b'"inode": -1'), "netns.inode"),
        (registry_module.encode_record(RECORD).replace(b"10.85.0.5", b"10.85.0"), "ips[0]"),
        (registry_module.encode_record(RECORD).replace(b'"c1"', b'"c2"'), "of another attachment"),
        (b" " * (registry_module.MAX_RECORD_BYTES + 1), "has more than"),
    ],
)
def test_an_unreadable_record_is_set_aside_and_the_others_load(
    tmp_path: Path, registry: Registry, content: bytes, problem: str
) -> None:
    registry.put(RECORD)
    other = record("c9")
    registry.put(other)
    path = tmp_path / "endpoints" / "c1@eth0.json"
    path.write_bytes(content)
    again = Registry(tmp_path / "endpoints")
    (unreadable,) = again.load()
    assert problem in unreadable.problem
    assert unreadable.path.read_bytes() == content
    assert dict(again.records) == {other.attachment: other}
    assert not path.exists()
    assert again.load() == ()
    assert [aside.path for aside in again.set_aside] == [unreadable.path]  # still shown, also by a later daemon


@pytest.mark.parametrize("is_recorded_anew", [False, True])
def test_what_was_set_aside_goes_with_its_attachment(
    tmp_path: Path, registry: Registry, *, is_recorded_anew: bool
) -> None:
    (tmp_path / "endpoints" / "c1@eth0.json").write_bytes(b"")
    (unreadable,) = registry.load()
    if is_recorded_anew:
        registry.put(RECORD)
    else:
        registry.remove(RECORD.attachment)
    assert registry.set_aside == ()
    assert not unreadable.path.exists()


def test_what_a_daemon_had_half_written_is_removed(tmp_path: Path, registry: Registry) -> None:
    half = tmp_path / "endpoints" / "c1@eth0.json.new"
    half.write_bytes(b'{"versi')
    reloaded(tmp_path)
    assert not half.exists()


def test_records_are_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_RECORDS", 1)
    registry.put(RECORD)
    registry.put(RECORD)
    with pytest.raises(RegistrationError, match="has 1 attachments already"):
        registry.put(record("c2"))


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "endpoints").rmdir()
    with pytest.raises(RegistrationError, match="cannot be written"):
        registry.put(RECORD)
    assert dict(registry.records) == {}
