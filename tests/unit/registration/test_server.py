# SPDX-License-Identifier: Apache-2.0
"""The registration server against callers that do not keep to the format; the plugin's own calls are its tests'."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.registration.fake import FakeRegistrar
from enforcer_daemon.registration.server import LIMITS, RegistrationServer
from tests.unit.registration.live_server import serving

ADD = messages.Add(
    attachment=messages.Attachment("c1", "eth0"),
    netns_path="/run/netns/x",
    network="pods",
    namespace="shop",
    pod="web-0",
    uid="",
    labels={},
    ips=("10.85.0.5",),
    host_interfaces=("veth1",),
    mtu=None,
)
STATUS = messages.encode_request(messages.Status())
MISMATCH = messages.PROTOCOL_MISMATCH


@pytest.fixture
def registrar() -> FakeRegistrar:
    return FakeRegistrar()


@pytest.fixture
def path(run_dir: Path, registrar: FakeRegistrar) -> Iterator[Path]:
    path = run_dir / "registration.sock"
    limits = replace(LIMITS, request_bytes=10_000, connections=2, request_timeout_s=0.2)
    with serving(RegistrationServer(path, registrar, limits)):
        yield path
        # Whatever a test sent, the server lives, and keeps no descriptor of it.
        assert exchange(path, STATUS) == messages.Reply()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def exchange(path: Path, data: bytes, descriptors: tuple[int, ...] = (), *, is_ended: bool = False) -> messages.Reply:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        socket.send_fds(connection, [data[:1]], descriptors)
        with contextlib.suppress(BrokenPipeError):  # it has refused already
            connection.sendall(data[1:])
        if is_ended:
            connection.shutdown(socket.SHUT_WR)
        return messages.decode_reply(connection.makefile("rb").readline())


@pytest.fixture
def netns_fd(netns_path: str) -> Iterator[int]:
    with Path(netns_path).open("rb") as file:
        yield file.fileno()


def changed(**changes: object) -> bytes:
    """The line of a right `add`, with changes; ... leaves a field out."""
    whole = {**json.loads(messages.encode_request(ADD)), **changes}
    return json.dumps({key: value for key, value in whole.items() if value is not ...}).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\n", "not JSON"),
        (b"garbage\n", "not JSON"),
        (b"\xff\xff\n", "not JSON"),
        (b"[" * 5000 + b"\n", "not JSON"),
        (b"[]\n", "must be an object"),
        (b"{}\n", "version: is missing"),
        (b'{"version":2}\n', "version: is 2, this side speaks 1"),
        (b'{"version":true}\n', "version"),
        (b'{"version":1}\n', "operation: is missing"),
        (b'{"version":1,"operation":"shutdown"}\n', "operation: must be"),
        (STATUS + STATUS, "more than one line"),
        (STATUS.replace(b"}", b',"x":1}'), "x: unknown field"),
        (b'"' + 20_000 * b"x" + b'"\n', "more than 10000 bytes"),
        (20_000 * b"x", "more than 10000 bytes"),
        (STATUS.rstrip(), "no whole line within 0.2 s"),
    ],
)
def test_what_is_no_request_is_refused(path: Path, data: bytes, text: str) -> None:
    reply = exchange(path, data)
    assert reply.code == MISMATCH
    assert text in reply.message


def test_a_request_that_ends_early_is_refused(path: Path) -> None:
    assert exchange(path, STATUS[:-5], is_ended=True).message == "the request: the line has no end"


def test_a_caller_that_goes_away_does_no_harm(path: Path) -> None:
    for data in (b"", b"{", STATUS):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.send(data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"containerId": ...}, "containerId: is missing"),
        ({"containerId": "../../etc"}, "containerId: "),
        ({"containerId": 5}, "containerId: must be a string"),
        ({"ifname": "a/b"}, "ifname: "),
        ({"ifname": "eth\ud800"}, "ifname: must be text"),
        ({"netns": ""}, "netns: must not be empty"),
        ({"network": "a b"}, "network: "),
        ({"pod": {"namespace": "shop", "name": "", "uid": ""}}, "name: must not be empty"),
        ({"pod": {"namespace": "shop", "name": "w", "uid": "", "node": ""}}, "pod.node: unknown field"),
        ({"labels": ["app"]}, "labels: must be an object"),
        ({"labels": {"app": None}}, "labels.app: must be a string"),
        ({"labels": {str(i): "" for i in range(513)}}, "labels: must be an object of at most 512"),
        ({"ips": []}, "ips: must not be empty"),
        ({"ips": ["10.0.0.1/24"]}, "ips[0]: "),
        ({"ips": ["10.0.0.1"] * 65}, "ips: must be a list of at most 64"),
        ({"hostInterfaces": ["a b"]}, "hostInterfaces[0]: "),
        ({"mtu": True}, "mtu: must be an integer"),
        ({"mtu": 10}, "mtu: must be an integer from 68"),
        ({"more": 1}, "more: unknown field"),
    ],
)
def test_a_field_that_does_not_hold_is_named(
    path: Path, registrar: FakeRegistrar, netns_fd: int, changes: dict[str, object], text: str
) -> None:
    reply = exchange(path, changed(**changes), (netns_fd,))
    assert reply.code == MISMATCH
    assert text in reply.message
    assert registrar.calls == []


def test_add_needs_exactly_one_descriptor(path: Path, registrar: FakeRegistrar, netns_fd: int) -> None:
    for descriptors, text in (((), "not 0"), ((netns_fd,) * 2, "not 2"), ((netns_fd,) * 20, "too many")):
        reply = exchange(path, changed(), descriptors)
        assert reply.code == MISMATCH
        assert text in reply.message
    assert registrar.calls == []


def test_other_operations_take_no_descriptor(path: Path, netns_fd: int) -> None:
    assert "brings a file descriptor" in exchange(path, STATUS, (netns_fd,)).message


def test_a_descriptor_must_be_of_a_pods_network_namespace(path: Path, registrar: FakeRegistrar) -> None:
    for name, code in (("/dev/null", 4), ("/proc/self/ns/mnt", 4), ("/proc/self/ns/net", 8)):
        with Path(name).open("rb") as file:
            assert exchange(path, changed(), (file.fileno(),)).code == code
    assert registrar.calls == []


def test_a_right_request_is_carried_out(path: Path, registrar: FakeRegistrar, netns_fd: int) -> None:
    assert exchange(path, changed(), (netns_fd,)) == messages.Reply()
    request, netns = registrar.added[AttachmentId("c1", "eth0")]
    assert (str(request.pod), netns.inode) == ("shop/web-0", os.fstat(netns_fd).st_ino)


def test_callers_beyond_the_bound_wait_and_slow_ones_are_dropped(path: Path) -> None:
    slow = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    try:
        for connection in slow:
            connection.connect(str(path))
        assert exchange(path, STATUS) == messages.Reply()
        assert all(b"no whole line" in connection.recv(1000) for connection in slow)
    finally:
        for connection in slow:
            connection.close()


def test_delete_waits_for_the_add_that_its_runtime_gave_up_on(run_dir: Path, netns_fd: int) -> None:
    class SlowRegistrar(FakeRegistrar):
        def __init__(self) -> None:
            super().__init__()
            self.is_entered = threading.Event()
            self.may_end = threading.Event()

        async def add(self, request: object, netns_fd: int) -> None:
            self.is_entered.set()
            await asyncio.to_thread(self.may_end.wait)
            await super().add(request, netns_fd)  # type: ignore[arg-type]

    registrar = SlowRegistrar()
    path = run_dir / "registration.sock"
    replies: list[messages.Reply] = []
    delete = messages.encode_request(messages.Delete(ADD.attachment))
    with serving(RegistrationServer(path, registrar)):
        with socket.socket(socket.AF_UNIX) as gives_up:
            gives_up.connect(str(path))
            socket.send_fds(gives_up, [changed()], [netns_fd])
            registrar.is_entered.wait()
        deleting = threading.Thread(target=lambda: replies.append(exchange(path, delete)))
        deleting.start()
        other = messages.encode_request(messages.Delete(messages.Attachment("c2", "eth0")))
        assert exchange(path, other) == messages.Reply()
        registrar.may_end.set()
        deleting.join()
    assert replies == [messages.Reply()]
    assert [call[0] for call in registrar.calls] == ["delete", "add", "delete"]
    assert registrar.added == {}


# The socket


def test_the_socket_is_for_its_owner_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_directory_that_kubelet_made_is_closed(run_dir: Path, registrar: FakeRegistrar) -> None:
    run_dir.mkdir(mode=0o755)
    with RegistrationServer(run_dir / "registration.sock", registrar):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert not (run_dir / "registration.sock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_not_answered(path: Path, registrar: FakeRegistrar) -> None:
    for made_reachable in (path.parent.parent, path.parent):
        made_reachable.chmod(0o755)
    path.chmod(0o666)
    child = os.fork()
    if child == 0:  # not a new interpreter: another user may not be able to read ours
        status = 2
        try:
            os.setuid(65_534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                status = 0 if connection.recv(100) == b"" else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_daemons_do_not_share_a_socket(run_dir: Path, registrar: FakeRegistrar) -> None:
    path = run_dir / "registration.sock"
    with RegistrationServer(path, registrar):
        with pytest.raises(RegistrationError, match="another daemon"), RegistrationServer(path, registrar):
            pass
        assert path.is_socket()


def test_the_socket_of_a_daemon_that_died_is_replaced(run_dir: Path, registrar: FakeRegistrar) -> None:
    path = run_dir / "registration.sock"
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(RegistrationServer(path, registrar)):
        assert exchange(path, STATUS) == messages.Reply()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_socket_is_not_replaced(
    run_dir: Path, registrar: FakeRegistrar, make: Callable[[Path], None]
) -> None:
    path = run_dir / "registration.sock"
    run_dir.mkdir()
    make(path)
    with pytest.raises(RegistrationError, match=r"not a socket"), RegistrationServer(path, registrar):
        pass
