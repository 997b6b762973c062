# SPDX-License-Identifier: Apache-2.0
"""Registration messages, records and the plugin's inputs, for all values and for any bytes."""

from __future__ import annotations

import io
import json

from hypothesis import given
from hypothesis import strategies as st

from cni_plugin import __main__ as plugin
from cni_plugin import messages
from enforcer_daemon.model import NetnsId
from enforcer_daemon.registration.registry import Record, decode_record, encode_record
from enforcer_daemon.registration.request import decode_add, encode_add

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,30}", fullmatch=True)
IFNAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=15).filter(
    lambda name: messages.ifname_fault(name) is None
)
ATTACHMENTS = st.builds(messages.Attachment, NAMES, IFNAMES)
NONEMPTY = TEXT.filter(bool)
ADDS = st.builds(
    messages.Add,
    attachment=ATTACHMENTS,
    netns_path=NONEMPTY,
    network=NAMES,
    namespace=NONEMPTY,
    pod=NONEMPTY,
    uid=TEXT,
    labels=st.dictionaries(TEXT, TEXT, max_size=5),
    ips=st.lists(st.ip_addresses().map(str), min_size=1, max_size=4).map(tuple),
    host_interfaces=st.lists(IFNAMES, max_size=3).map(tuple),
    mtu=st.none() | st.integers(68, 65_536),
)
REQUESTS = st.one_of(
    ADDS,
    st.builds(messages.Delete, ATTACHMENTS),
    st.builds(messages.Check, ATTACHMENTS, NONEMPTY),
    st.builds(messages.Collect, NAMES, st.lists(ATTACHMENTS, max_size=3).map(tuple)),
    st.builds(messages.Status),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    (
        "version",
        "operation",
        "containerId",
        "ifname",
        "netns",
        "network",
        "pod",
        "labels",
        "ips",
        "hostInterfaces",
        "mtu",
    )
)


@given(REQUESTS)
def test_every_request_survives_its_line(request: messages.Request) -> None:
    line = messages.encode_request(request)
    assert line.index(b"\n") == len(line) - 1
    assert messages.decode_request(line) == request


@given(st.builds(messages.Reply, st.integers(0, 999), TEXT, st.booleans()))
def test_every_reply_survives_its_line(reply: messages.Reply) -> None:
    assert messages.decode_reply(messages.encode_reply(reply)) == reply


@given(ADDS, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_every_record_survives_its_file(add: messages.Add, device: int, inode: int) -> None:
    record = Record(decode_add(add), NetnsId(device, inode))
    assert encode_add(record.request) == add._replace(ips=tuple(str(ip) for ip in record.request.ips))
    assert decode_record(encode_record(record)) == record


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_reply, decode_record):
        try:
            decode(data)
        except messages.MessageError:
            continue


@given(ADDS, FIELDS, JSON)
def test_an_add_with_any_field_replaced_is_a_request_or_an_error(add: messages.Add, name: str, value: object) -> None:
    tree = {**json.loads(messages.encode_request(add)), name: value}
    try:
        request = messages.decode_request(json.dumps(tree).encode())
        if isinstance(request, messages.Add):
            decode_add(request)
    except messages.MessageError:
        return


@given(ATTACHMENTS, ATTACHMENTS)
def test_no_two_attachments_share_a_file(one: messages.Attachment, other: messages.Attachment) -> None:
    assert (one.file_name == other.file_name) == (one == other)
    assert "/" not in one.file_name
    assert len(one.file_name.encode()) <= 255


@given(
    st.sampled_from(("ADD", "CHECK", "GC", "STATUS")),
    st.sampled_from(("prevResult", "args", "name", "cniVersion", "runDir", "cni.dev/valid-attachments", "logFile")),
    JSON,
)
def test_the_plugin_answers_any_configuration_with_json(command: str, key: str, value: object) -> None:
    env = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/nonexistent"}
    tree = {"cniVersion": "1.1.0", "name": "n", "runDir": "/nonexistent", "prevResult": {"ips": []}, key: value}
    stdout, stderr = io.StringIO(), io.StringIO()
    if command == "STATUS" or key == "cni.dev/valid-attachments":
        tree["unknown"] = 1  # so that nobody waits for a daemon
    status = plugin.main(env, io.BytesIO(json.dumps(tree).encode()), stdout, stderr)
    assert stderr.getvalue() == ""
    if stdout.getvalue():
        answer = json.loads(stdout.getvalue())
        assert (status == 0) == ("code" not in answer)
        assert answer.get("code") != 100
    else:
        assert status == 0
