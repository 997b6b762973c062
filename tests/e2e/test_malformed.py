# SPDX-License-Identifier: Apache-2.0
"""Callers of the daemon's sockets that do not keep to the format: a documented error, and the daemon goes on."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cni_plugin import messages
from enforcer_daemon.model import PodRef
from tests.e2e.attack import DB, SERVED_PORT, SETTLE_S
from trireme_lab import Lab, Outcome, PodSpec, PortSpec
from trireme_lab.netns import netns_path
from trireme_lab.node import Node

pytestmark = pytest.mark.kernel

REGISTRATION = "registration.sock"
ADMIN = "admin.sock"
SOCKETS = (REGISTRATION, ADMIN)
SEED = 20_261_122
PLACES = {REGISTRATION: 64, ADMIN: 16}
"""How many callers each socket serves at a time."""
NOBODY = 65_534
LIMITS = {REGISTRATION: messages.MAX_REQUEST_BYTES, ADMIN: 64 * 1024}
ADD = messages.Add(
    attachment=messages.Attachment("made-up", "eth0"),
    netns_path="/run/netns/made-up",
    network="trireme",
    namespace="shop",
    pod="made-up",
    uid="",
    labels={},
    ips=("10.244.1.77",),
    host_interfaces=(),
    mtu=1500,
)
STATUS = messages.encode_request(messages.Status())
BY_NOBODY = """
import os, socket, sys
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(5)
try:
    caller.connect(sys.argv[1])
    caller.sendall(sys.stdin.buffer.read())
    sys.stdout.buffer.write(caller.recv(65536))
except OSError as err:
    print(type(err).__name__)
"""
each_socket = pytest.mark.parametrize("name", SOCKETS)


@pytest.fixture(autouse=True)
def the_daemon_goes_on(world: Lab) -> Iterator[None]:
    """After each test the same daemon answers, and nothing was an internal error."""
    node = world.node("a")
    pid = node.daemon.pid
    yield
    assert node.status()["ready"] is True
    assert node.daemon.pid == pid
    assert node.daemon.exit_status is None
    assert "internal" not in node.log_text()
    assert "Traceback" not in node.log_text()


def path_of(lab: Lab, name: str) -> Path:
    return lab.node("a").directories.run / name


def say(path: Path, line: bytes, descriptors: Sequence[int] = (), *, is_ended: bool = True) -> bytes:
    """Send the bytes and hang up, unless told not to; return all that is answered."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(str(path))
        try:
            if descriptors:
                socket.send_fds(caller, [line], descriptors)
            else:
                caller.sendall(line)
            if is_ended:
                caller.shutdown(socket.SHUT_WR)
        except BrokenPipeError:  # it has heard enough
            pass
        return receive_all(caller)


def receive_all(caller: socket.socket) -> bytes:
    answer = b""
    try:
        while part := caller.recv(65_536):
            answer += part
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return answer


def refusal(name: str, answer: bytes) -> str:
    """Return the text of a refusal; fail where it is none."""
    assert answer.endswith(b"\n")
    if name == ADMIN:
        reply = json.loads(answer)
        assert reply["ok"] is False
        return str(reply["error"])
    code, message, is_retryable = messages.decode_reply(answer)
    assert code == messages.PROTOCOL_MISMATCH
    assert not is_retryable
    return message


# One line, and what may be wrong with it.


@each_socket
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"", "no end"),
        (STATUS[:-1], "no end"),
        (STATUS[:10], "no end"),
        (STATUS + STATUS, "more than one line"),
        (b"\n", "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[" * 50_000 + b"\n", "not JSON"),
        (b"[]\n", "object"),
        (b'{"version":2,"operation":"status","command":"status"}\n', "version"),
        (b'{"version":"1","operation":"status","command":"status"}\n', "version"),
        (b'{"operation":"status","command":"status"}\n', "version"),
        (b'{"version":1,"operation":"format","command":"format"}\n', "must be"),
        (b'{"version":1,"operation":["add"],"command":{"a":1}}\n', "must be"),
        (b'{"version":1,"operation":"status","command":"status","more":1}\n', "more"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:40]),
)
def test_a_line_that_is_no_request(world: Lab, name: str, line: bytes, problem: str) -> None:
    if problem == "more":  # each socket knows the other's word for what is asked as little as any
        line = line.replace(b'"command":"status",' if name == REGISTRATION else b'"operation":"status",', b"")
    assert problem in refusal(name, say(path_of(world, name), line))


@each_socket
def test_a_line_that_is_too_long(world: Lab, name: str) -> None:
    answer = say(path_of(world, name), b'{"version":1,"' + b"x" * (LIMITS[name] + 70_000))
    if answer:  # a reset may overtake it
        assert f"more than {LIMITS[name]} bytes" in refusal(name, answer)


@each_socket
def test_a_thousand_random_and_mutated_lines(world: Lab, name: str) -> None:
    dice = random.Random(SEED)
    good = (STATUS, messages.encode_request(ADD), b'{"version":1,"command":"endpoints","pod":"shop/db"}\n')
    for _ in range(500):
        line = bytearray(dice.choice(good) if dice.random() < 0.8 else dice.randbytes(dice.randrange(300)))
        for _ in range(dice.randrange(1, 6)):
            if line:
                line[dice.randrange(len(line))] = dice.randrange(256)
        answer = say(path_of(world, name), bytes(line))
        assert answer.endswith(b"\n")
        assert json.loads(answer)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("containerId", "../../etc/passwd"),
        ("containerId", "x" * 10_000),
        ("ifname", "eth0/../../x"),
        ("ifname", ""),
        ("netns", ""),
        ("labels", {"a": 1}),
        ("labels", ["a"]),
        ("ips", []),
        ("ips", ["10.0.0.256"]),
        ("ips", "10.0.0.1"),
        ("hostInterfaces", ["a b"]),
        ("mtu", 1 << 70),
        ("mtu", -1),
        ("pod", "shop/made-up"),
    ],
)
def test_a_registration_with_an_impossible_field(world: Lab, field: str, value: object) -> None:
    fields = {**json.loads(messages.encode_request(ADD)), field: value}
    with opened(netns_path(world.place(DB).netns)) as netns:
        answer = say(path_of(world, REGISTRATION), json.dumps(fields).encode() + b"\n", [netns])
    assert field in refusal(REGISTRATION, answer)


# The descriptor that goes along.


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def add_with(lab: Lab, descriptors: Sequence[int]) -> messages.Reply:
    return messages.decode_reply(say(path_of(lab, REGISTRATION), messages.encode_request(ADD), descriptors))


@pytest.mark.parametrize("count", [0, 2, 4, 40])
def test_any_number_of_descriptors_but_one(world: Lab, count: int) -> None:
    with opened(netns_path(world.place(DB).netns)) as netns:
        before = open_descriptors(world.node("a"))
        reply = add_with(world, [netns] * count)
        assert reply.code == messages.PROTOCOL_MISMATCH
        assert "descriptor" in reply.message
        require_no_more_descriptors(world.node("a"), before)


def test_a_descriptor_that_is_no_network_namespace(world: Lab) -> None:
    for path in (Path("/dev/null"), Path("/proc/self/ns/mnt"), world.directory):
        with opened(path) as descriptor:
            assert add_with(world, [descriptor]).code == messages.UNUSABLE_NETNS


def test_the_namespace_of_the_node_itself(world: Lab) -> None:
    with opened(netns_path(world.place("node:a").netns)) as netns:
        assert add_with(world, [netns]).code == messages.NODE_NETNS


def test_a_namespace_that_is_another_pods(world: Lab) -> None:
    with opened(netns_path(world.place(DB).netns)) as netns:
        reply = add_with(world, [netns])
    assert reply.code == messages.FAILED
    assert DB in reply.message


def test_descriptors_where_none_belongs(world: Lab) -> None:
    before = open_descriptors(world.node("a"))
    with opened(Path("/dev/null")) as descriptor:
        assert "descriptor" in refusal(REGISTRATION, say(path_of(world, REGISTRATION), STATUS, [descriptor]))
        say(path_of(world, ADMIN), b'{"version":1,"command":"status"}\n', [descriptor])
    require_no_more_descriptors(world.node("a"), before)


def open_descriptors(node: Node) -> int:
    return len(list(Path(f"/proc/{node.daemon.pid}/fd").iterdir()))


def require_no_more_descriptors(node: Node, before: int) -> None:
    """Fail where the daemon keeps more descriptors open than before; a caller's own takes a moment to close."""
    deadline = time.monotonic() + 3
    while open_descriptors(node) > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Who calls, and how slowly.


@each_socket
def test_nobody_may_call(world: Lab, name: str) -> None:
    """Neither by the path, nor where the modes on the way allow it."""
    assert call_as_nobody(path_of(world, name), STATUS) == b"PermissionError\n"
    with permitted(path_of(world, name)):
        assert call_as_nobody(path_of(world, name), STATUS) in (b"", b"ConnectionResetError\n", b"BrokenPipeError\n")
    refused = [record for record in world.node("a").log_records() if record.get("uid") == NOBODY]
    assert [record["event"] for record in refused if str(record["socket"]).endswith(name)] == ["caller refused"]


def call_as_nobody(path: Path, line: bytes) -> bytes:
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env", "python3"]
    done = subprocess.run(
        [*argv, "-c", BY_NOBODY, str(path)], input=line, capture_output=True, check=True, timeout=10, cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout


@contextmanager
def permitted(path: Path) -> Iterator[None]:
    """Open the modes from the lab's directory down to the socket, as a careless mount would."""
    changed = {place: place.stat().st_mode & 0o7777 for place in (path, path.parent, *path.parents[1:3])}
    try:
        for place in changed:
            place.chmod(0o777)
        yield
    finally:
        for place, mode in changed.items():
            place.chmod(mode)


def test_slow_callers_cannot_keep_others_out(world: Lab) -> None:
    """All places of both sockets are taken by callers that never finish; a pod starts all the same."""
    node = world.node("a")
    assert world.probe("shop/web", DB, SERVED_PORT).outcome is Outcome.CONNECTED
    time.sleep(SETTLE_S)  # The server's first lease message opens the socket that it keeps for messages of its own.
    before = open_descriptors(node)
    with ExitStack() as stack:
        slow = {
            name: [stack.enter_context(slow_caller(path_of(world, name))) for _ in range(places)]
            for name, places in PLACES.items()
        }
        started = time.monotonic()
        world.add_pod(PodSpec(PodRef("shop", "patient"), "a", labels={"app": "web"}, ports=(PortSpec(80),)))
        assert node.status()["ready"] is True
        assert time.monotonic() - started < 15
        assert world.probe("shop/patient", DB, SERVED_PORT).outcome is Outcome.CONNECTED
        for name, callers in slow.items():
            assert "no whole line within" in refusal(name, receive_all(callers[0]))
    world.remove_pod("shop/patient")
    require_no_more_descriptors(node, before)


@contextmanager
def slow_caller(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(str(path))
        caller.sendall(b"{")
        yield caller


def test_those_who_may_connect_still_can(world: Lab) -> None:
    endpoints: list[Mapping[str, object]] = world.node("a").endpoints()
    assert sorted(str(endpoint["pod"]) for endpoint in endpoints) == ["caged", "db", "web"]
    assert world.probe("shop/web", DB, SERVED_PORT).outcome is Outcome.CONNECTED
