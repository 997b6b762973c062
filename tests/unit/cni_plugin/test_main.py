# SPDX-License-Identifier: Apache-2.0
"""Every row of the plugin's behavior table (docs/registration.md), against a real registration server."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cni_plugin import __main__ as plugin
from cni_plugin import deletions, messages
from enforcer_daemon.errors import NetnsError, RegistrationError
from enforcer_daemon.model import AttachmentId, PodRef
from enforcer_daemon.registration.fake import FakeRegistrar
from enforcer_daemon.registration.server import Availability, Readiness, RegistrationServer
from tests.unit.registration.live_server import serving

ATTACHMENT = AttachmentId("c1", "eth0")
VECTORS = Path(__file__).parents[2] / "vectors" / "cni-results"
K8S_ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=c1"
PREV_RESULT = {
    "cniVersion": "1.1.0",
    "interfaces": [
        {"name": "cni0", "mac": "00:00:00:00:00:01"},
        {"name": "veth1234", "mac": "00:00:00:00:00:02", "mtu": 1500},
        {"name": "eth0", "mac": "00:00:00:00:00:03", "mtu": 1450, "sandbox": "/run/netns/x"},
    ],
    "ips": [
        {"address": "10.85.0.5/24", "gateway": "10.85.0.1", "interface": 2},
        {"address": "fd85::5/64", "interface": 2},
        {"address": "10.85.0.1/24", "interface": 0},
    ],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {},
}


class Outcome(NamedTuple):
    """What a runtime sees."""

    status: int
    output: Any
    stderr: str


class Plugin:
    """Calls the plugin as a runtime does; everything but what a test is about is right."""

    def __init__(self, run_dir: Path, netns_path: str) -> None:
        self.run_dir = run_dir
        self.netns_path = netns_path
        self.add_timeout_s = 0.2

    def config(self, **changes: object) -> dict[str, object]:
        """A right configuration with changes; a change to ... leaves the key out."""
        whole = {
            "cniVersion": "1.1.0",
            "name": "pods",
            "type": "trireme",
            "runDir": str(self.run_dir),
            "addTimeoutSeconds": self.add_timeout_s,
            "prevResult": PREV_RESULT,
            **changes,
        }
        return {key: value for key, value in whole.items() if value is not ...}

    def run(
        self, command: str, config: object = ..., env: Mapping[str, str | None] | None = None, **changes: object
    ) -> Outcome:
        whole = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": self.netns_path,
            "CNI_ARGS": K8S_ARGS,
            **(env or {}),
        }
        tree = self.config(**changes) if config is ... else config
        data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        stdout, stderr = io.StringIO(), io.StringIO()
        named = {key: value for key, value in whole.items() if value is not None}
        status = plugin.main(named, io.BytesIO(data), stdout, stderr)
        output = json.loads(stdout.getvalue()) if stdout.getvalue() else None
        return Outcome(status, output, stderr.getvalue())


TIMEOUTS = ("SHORT_TIMEOUT_S", "LAST_TIMEOUT_S", "STATUS_TIMEOUT_S")


@pytest.fixture
def cni(run_dir: Path, netns_path: str, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Without a daemon, every wait is in vain: the waits are short."""
    for name in TIMEOUTS:
        monkeypatch.setattr(plugin, name, 0.1)
    return Plugin(run_dir, netns_path)


@pytest.fixture
def registrar(cni: Plugin, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistrar]:
    """With a daemon, which answers at once but for a busy machine: the waits are long."""
    for name in TIMEOUTS:
        monkeypatch.setattr(plugin, name, 10)
    cni.add_timeout_s = 10
    registrar = FakeRegistrar()
    with serving(RegistrationServer(cni.run_dir / "registration.sock", registrar)):
        yield registrar


def assert_error(outcome: Outcome, code: int, text: str) -> None:
    assert outcome.status == 1
    assert outcome.output["code"] == code
    assert text in outcome.output["msg"]
    assert f"(CNI error {code})" in outcome.output["msg"]
    assert outcome.stderr == ""


# VERSION, and no command


def test_version_needs_neither_configuration_nor_daemon(cni: Plugin) -> None:
    outcome = cni.run("VERSION", config=b"")
    versions = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert outcome == Outcome(0, {"cniVersion": "1.1.0", "supportedVersions": versions}, "")


def test_a_person_is_told_what_this_is(cni: Plugin) -> None:
    outcome = cni.run("", config=b"")
    assert (outcome.status, outcome.output) == (0, None)
    assert outcome.stderr.startswith("trireme: a CNI plugin")
    assert outcome.stderr.count("\n") == 1


# What is wrong before anybody is asked


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"CNI_COMMAND": "add"}, "CNI_COMMAND"),
        ({"CNI_CONTAINERID": None}, "CNI_CONTAINERID: is missing"),
        ({"CNI_CONTAINERID": "../x"}, "CNI_CONTAINERID: must begin"),
        ({"CNI_CONTAINERID": "x" * 201}, "CNI_CONTAINERID: must not have more"),
        ({"CNI_IFNAME": ""}, "CNI_IFNAME: is missing"),
        ({"CNI_IFNAME": "a/b"}, "CNI_IFNAME: must be"),
        ({"CNI_IFNAME": "sixteen-letters-"}, "CNI_IFNAME: must not have more"),
        ({"CNI_NETNS": None}, "CNI_NETNS: is missing"),
        ({"CNI_ARGS": "K8S_POD_NAME"}, "CNI_ARGS"),
        ({"CNI_ARGS": "K8S_POD_NAMESPACE=shop"}, "K8S_POD_NAME: is missing"),
        ({"CNI_ARGS": "K8S_POD_NAME=web-0"}, "K8S_POD_NAMESPACE: is missing"),
    ],
)
def test_bad_environment_is_4(cni: Plugin, env: dict[str, str | None], text: str) -> None:
    assert_error(cni.run("ADD", env=env), 4, text)


def test_standard_input_that_fails_is_5(cni: Plugin) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with socket.socket() as unconnected, unconnected.makefile("rb") as stdin:
        status = plugin.main({"CNI_COMMAND": "STATUS"}, stdin, stdout, stderr)
    assert_error(Outcome(status, json.loads(stdout.getvalue()), ""), 5, "standard input")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_standard_input_that_is_no_object_is_6(cni: Plugin, data: bytes) -> None:
    assert_error(cni.run("ADD", config=data), 6, "standard input")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ...}, "name: is missing"),
        ({"name": "a b"}, "name: "),
        ({"cniVersion": 1}, "cniVersion: must be a string"),
        ({"runDir": "run"}, "runDir: must be an absolute path"),
        ({"runDir": "/\ud800"}, "runDir: must be an absolute path"),
        ({"runDir": "/" + 88 * "x"}, "runDir: must not have more"),
        ({"rundir": "/run"}, "rundir: unknown key"),
        ({"excludedNamespaces": "kube-system"}, "excludedNamespaces: "),
        ({"addTimeoutSeconds": 0}, "addTimeoutSeconds: "),
        ({"addTimeoutSeconds": True}, "addTimeoutSeconds: "),
        ({"logFile": "log"}, "logFile: "),
        ({"args": {"cni": {"labels": "app=web"}}}, "args.cni.labels: "),
        ({"args": {"cni": {"labels": [{"key": "app"}]}}}, "args.cni.labels: "),
        ({"args": {"cni": {"labels": {"app": 1}}}}, "args.cni.labels: "),
    ],
)
def test_bad_configuration_is_7_and_names_the_key(cni: Plugin, changes: dict[str, Any], text: str) -> None:
    assert_error(cni.run("ADD", **changes), 7, text)


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "2.0.0", ...])
def test_a_version_that_we_do_not_speak_is_1(cni: Plugin, version: object) -> None:
    assert_error(cni.run("ADD", cniVersion=version), 1, "cniVersion")


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")])
def test_a_command_that_its_version_lacks_is_1(cni: Plugin, command: str, version: str) -> None:
    assert_error(cni.run(command, cniVersion=version), 1, command)


# ADD


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_add_registers_and_hands_on_the_result(cni: Plugin, registrar: FakeRegistrar, version: str) -> None:
    outcome = cni.run("ADD", cniVersion=version, args={"cni": {"labels": [{"key": "app", "value": "web"}]}})
    assert outcome == Outcome(0, {**PREV_RESULT, "cniVersion": version}, "")
    request, netns = registrar.added[ATTACHMENT]
    assert request.pod == PodRef("shop", "web-0")
    assert (request.uid, request.network, request.labels) == ("u-1", "pods", {"app": "web"})
    assert request.ips == (ip_address("10.85.0.5"), ip_address("fd85::5"))
    assert (request.host_interfaces, request.mtu) == (("cni0", "veth1234"), 1450)
    assert request.netns_path == cni.netns_path
    assert netns.inode == Path(cni.netns_path).stat().st_ino


def test_add_of_a_result_with_a_placeholder_registers_and_hands_it_on(cni: Plugin, registrar: FakeRegistrar) -> None:
    vector = json.loads((VECTORS / "aws-vpc.json").read_text())
    outcome = cni.run("ADD", cniVersion="0.4.0", prevResult=vector["prevResult"])
    assert outcome == Outcome(0, vector["prevResult"], "")
    assert registrar.added[ATTACHMENT][0].ips == (ip_address("10.24.1.9"),)


def test_add_can_be_repeated_and_takes_a_second_interface(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert cni.run("ADD").status == 0
    assert cni.run("ADD").status == 0
    second = {
        **PREV_RESULT,
        "interfaces": [{"name": "net1", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "1.2.3.4"}],
    }
    assert cni.run("ADD", env={"CNI_IFNAME": "net1"}, prevResult=second).status == 0
    assert set(registrar.added) == {ATTACHMENT, AttachmentId("c1", "net1")}


def test_add_of_labels_without_kubernetes_registers_the_container(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert cni.run("ADD", env={"CNI_ARGS": None}, args={"cni": {"labels": {"app": "web"}}}).status == 0
    assert registrar.added[ATTACHMENT][0].pod == PodRef("default", "c1")


def test_add_passes_through_what_is_no_pod_or_is_excluded(cni: Plugin, registrar: FakeRegistrar) -> None:
    expected = Outcome(0, PREV_RESULT, "")
    assert cni.run("ADD", env={"CNI_ARGS": None}) == expected
    assert cni.run("ADD", env={"CNI_ARGS": "IgnoreUnknown=1"}) == expected
    assert cni.run("ADD", excludedNamespaces=["kube-system", "shop"]) == expected
    assert registrar.calls == []


def test_add_without_a_previous_result_is_7(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert_error(cni.run("ADD", prevResult=...), 7, "prevResult: is missing")
    assert_error(cni.run("ADD", prevResult=None), 7, "prevResult: is missing")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ([], "prevResult: must be an object"),
        ({}, "prevResult.ips: has no address of the pod"),
        ({"ips": 1}, "prevResult.ips: must be a list"),
        ({"ips": [{}]}, "prevResult.ips[0].address"),
        ({"ips": [{"address": "10.0.0.300/8"}]}, "prevResult.ips[0].address"),
        ({"ips": [{"address": "1.2.3.4\0"}]}, "prevResult.ips[0].address"),
        ({"ips": [{"address": "10.0.0.3/8", "interface": 0}]}, "prevResult.ips[0].interface"),
        ({"interfaces": 1, "ips": [{"address": "10.0.0.3/8"}]}, "prevResult.interfaces: must be a list"),
        ({"ips": [{"address": f"10.0.0.{i}"} for i in range(65)]}, "prevResult.ips: must not have more"),
    ],
)
def test_add_with_a_malformed_previous_result_is_6(cni: Plugin, result: object, text: str) -> None:
    assert_error(cni.run("ADD", prevResult=result), 6, text)


def test_add_of_a_namespace_that_cannot_be_opened_is_4(cni: Plugin, registrar: FakeRegistrar, tmp_path: Path) -> None:
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.touch()
    os.mkfifo(fifo)
    for path in (tmp_path / "absent", file, fifo, Path("/proc/self/ns/mnt")):
        assert_error(cni.run("ADD", env={"CNI_NETNS": str(path)}), 4, f"CNI_NETNS: {path}")
    assert registrar.calls == []


def test_add_of_the_nodes_own_namespace_is_8(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert_error(cni.run("ADD", env={"CNI_NETNS": "/proc/self/ns/net"}), 8, "the node's own")
    assert registrar.calls == []


def test_add_without_a_daemon_is_11(cni: Plugin) -> None:
    assert_error(cni.run("ADD"), 11, "not ready within 0.2 s")


def test_add_while_the_daemon_starts_is_11(cni: Plugin, registrar: FakeRegistrar) -> None:
    registrar.failure = RegistrationError(messages.TRY_AGAIN, "no snapshot yet", retryable=True)
    assert_error(cni.run("ADD", addTimeoutSeconds=1), 11, "no snapshot yet")
    assert len(registrar.calls) > 1


def test_add_succeeds_once_the_daemon_is_there(cni: Plugin) -> None:
    registrar = FakeRegistrar()
    outcome: list[Outcome] = []
    waiting = threading.Thread(target=lambda: outcome.append(cni.run("ADD", addTimeoutSeconds=10)))
    waiting.start()
    with serving(RegistrationServer(cni.run_dir / "registration.sock", registrar)):
        waiting.join()
    assert outcome[0].status == 0
    assert ATTACHMENT in registrar.added


@pytest.mark.parametrize(
    ("failure", "code", "text"),
    [
        (RegistrationError(messages.POD_GONE, "shop/web-0 is gone"), 3, "shop/web-0 is gone"),
        (RegistrationError(messages.FAILED, "the labels are too large"), 101, "the labels are too large"),
        (NetnsError("cannot enter"), 101, "cannot enter"),
        (KeyError("bug"), 101, "internal error of the enforcer (KeyError)"),
    ],
)
def test_add_reports_the_daemons_refusal(
    cni: Plugin, registrar: FakeRegistrar, failure: Exception, code: int, text: str
) -> None:
    registrar.failure = failure
    assert_error(cni.run("ADD"), code, text)
    assert len(registrar.calls) == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b'{"version":2,"ok":true}\n', b"x" * 70_000])
def test_add_of_an_answer_that_cannot_be_read_is_102(cni: Plugin, answer: bytes) -> None:
    cni.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(cni.run_dir / "registration.sock"))
        listener.listen()

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 65_536, 1)
                os.close(descriptors[0])
                connection.sendall(answer)

        daemon = threading.Thread(target=answer_once)
        daemon.start()
        outcome = cni.run("ADD", addTimeoutSeconds=5)
        daemon.join()
    assert_error(outcome, 102, "answer")


# DEL


def test_delete_forgets_the_attachment(cni: Plugin, registrar: FakeRegistrar) -> None:
    cni.run("ADD")
    assert cni.run("DEL") == Outcome(0, None, "")
    assert registrar.added == {}
    assert cni.run("DEL") == Outcome(0, None, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ...},
        {"cniVersion": "9"},
        {"prevResult": ...},
        {"prevResult": 1},
        {"unknown": 1},
        {"args": 1},
        {"logFile": "/\ud800"},
    ],
)
def test_delete_succeeds_whatever_the_configuration(
    cni: Plugin, registrar: FakeRegistrar, changes: dict[str, Any]
) -> None:
    assert cni.run("DEL", env={"CNI_NETNS": None, "CNI_ARGS": "%"}, **changes) == Outcome(0, None, "")
    assert registrar.calls == [("delete", ATTACHMENT)]


def test_delete_succeeds_without_a_configuration(cni: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cni_plugin.config.DEFAULT_RUN_DIR", str(cni.run_dir))
    assert cni.run("DEL", config=b"{") == Outcome(0, None, "")


@pytest.mark.parametrize("failure", [RegistrationError(101, "no"), KeyError("bug")])
def test_delete_succeeds_whatever_the_daemon_says(cni: Plugin, registrar: FakeRegistrar, failure: Exception) -> None:
    registrar.failure = failure
    assert cni.run("DEL") == Outcome(0, None, "")


def test_delete_without_a_daemon_is_queued_until_it_is_back(cni: Plugin) -> None:
    cni.run_dir.mkdir()
    assert cni.run("DEL") == Outcome(0, None, "")
    assert cni.run("DEL") == Outcome(0, None, "")
    (queued,) = (cni.run_dir / "deletions").iterdir()
    assert messages.decode_request(queued.read_bytes()) == messages.Delete(messages.Attachment("c1", "eth0"))


def test_delete_takes_its_file_back_from_a_daemon_that_has_just_come(
    cni: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "LAST_TIMEOUT_S", 10)
    cni.run_dir.mkdir()
    registrar = FakeRegistrar()
    enqueue = deletions.enqueue
    with serving(RegistrationServer(cni.run_dir / "registration.sock", registrar)):
        (cni.run_dir / "registration.sock").rename(cni.run_dir / "away")

        def enqueue_as_the_daemon_comes(run_dir: str, attachment: messages.Attachment) -> str:
            path = enqueue(run_dir, attachment)
            (cni.run_dir / "away").rename(cni.run_dir / "registration.sock")
            return path

        monkeypatch.setattr(deletions, "enqueue", enqueue_as_the_daemon_comes)
        assert cni.run("DEL") == Outcome(0, None, "")
    assert registrar.calls == [("delete", ATTACHMENT)]
    assert list((cni.run_dir / "deletions").iterdir()) == []


def test_delete_succeeds_where_nothing_can_be_queued(cni: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    log = cni.run_dir.parent / "log"
    assert cni.run("DEL", logFile=str(log)) == Outcome(0, None, "")
    assert not cni.run_dir.exists()
    monkeypatch.setattr(deletions, "MAX_QUEUED", 1)
    cni.run_dir.mkdir()
    assert cni.run("DEL", logFile=str(log)).status == 0
    assert cni.run("DEL", env={"CNI_CONTAINERID": "c2"}, logFile=str(log)).status == 0
    assert len(list((cni.run_dir / "deletions").iterdir())) == 1
    assert "has 1 files already" in log.read_text()


@pytest.mark.parametrize("name", ["CNI_CONTAINERID", "CNI_IFNAME"])
def test_delete_without_its_names_is_4(cni: Plugin, name: str) -> None:
    assert_error(cni.run("DEL", env={name: None}), 4, f"{name}: is missing")


def test_delete_of_a_name_that_no_add_can_have_had_succeeds(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert cni.run("DEL", env={"CNI_CONTAINERID": "../x"}) == Outcome(0, None, "")
    assert registrar.calls == []


# CHECK, GC, STATUS


def test_check_of_an_enforced_pod_succeeds(cni: Plugin, registrar: FakeRegistrar) -> None:
    cni.run("ADD")
    assert cni.run("CHECK") == Outcome(0, None, "")


def test_check_of_a_pod_that_is_not_registered_is_103(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert_error(cni.run("CHECK"), 103, "not registered")


def test_check_passes_over_what_was_passed_through(cni: Plugin) -> None:
    assert cni.run("CHECK", excludedNamespaces=["shop"]) == Outcome(0, None, "")
    assert cni.run("CHECK", env={"CNI_ARGS": None}) == Outcome(0, None, "")


def test_check_without_a_daemon_is_11_and_without_a_result_7(cni: Plugin) -> None:
    assert_error(cni.run("CHECK"), 11, "not ready")
    assert_error(cni.run("CHECK", prevResult=...), 7, "prevResult")


@pytest.mark.parametrize("key", ["cni.dev/valid-attachments", "cni.dev/attachments"])
@pytest.mark.parametrize(
    ("listed", "left"),
    [([{"containerID": "c1", "ifname": "eth0"}], {ATTACHMENT}), ([], set()), (None, set())],
)
def test_gc_forgets_what_is_not_listed(
    cni: Plugin, registrar: FakeRegistrar, key: str, listed: object, left: set[AttachmentId]
) -> None:
    cni.run("ADD")
    cni.run("ADD", env={"CNI_CONTAINERID": "c2"})
    cni.run("ADD", env={"CNI_CONTAINERID": "c3"}, name="other")
    assert cni.run("GC", cni.config(**{key: listed})) == Outcome(0, None, "")
    assert set(registrar.added) == left | {AttachmentId("c3", "eth0")}


def test_gc_without_information_does_nothing(cni: Plugin) -> None:
    assert cni.run("GC", env={"CNI_CONTAINERID": None, "CNI_IFNAME": None}) == Outcome(0, None, "")


def test_gc_without_a_daemon_is_11(cni: Plugin) -> None:
    assert_error(cni.run("GC", cni.config(**{"cni.dev/valid-attachments": []})), 11, "not ready")


@pytest.mark.parametrize("listed", [1, [1], [{"containerID": "c1"}], [{"containerID": "/", "ifname": "eth0"}]])
def test_gc_of_a_malformed_list_is_7_and_forgets_nothing(cni: Plugin, registrar: FakeRegistrar, listed: object) -> None:
    assert_error(cni.run("GC", cni.config(**{"cni.dev/valid-attachments": listed})), 7, "cni.dev/valid-attachments")
    assert registrar.calls == []


def test_status_of_a_ready_daemon_succeeds(cni: Plugin, registrar: FakeRegistrar) -> None:
    assert cni.run("STATUS", env={"CNI_CONTAINERID": None}) == Outcome(0, None, "")


@pytest.mark.parametrize(("availability", "code"), [(Availability.NOT_READY, 50), (Availability.PODS_CUT_OFF, 51)])
def test_status_reports_what_is_missing(
    cni: Plugin, registrar: FakeRegistrar, availability: Availability, code: int
) -> None:
    registrar.state = Readiness(availability, "no snapshot yet")
    assert_error(cni.run("STATUS"), code, "no snapshot yet")


def test_status_without_a_daemon_is_50(cni: Plugin) -> None:
    assert_error(cni.run("STATUS"), 50, "no daemon listens here")


# Faults of our own


@pytest.mark.parametrize("command", ["ADD", "CHECK", "GC", "STATUS"])
def test_an_unexpected_exception_is_100_with_its_trace_in_the_log(
    cni: Plugin, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr("cni_plugin.client.call", fail)
    changes: dict[str, Any] = {"logFile": str(tmp_path / "log"), "cni.dev/valid-attachments": []}
    assert_error(cni.run(command, **changes), 100, "unexpected ZeroDivisionError: bug")
    assert "Traceback" in (tmp_path / "log").read_text()
    assert cni.run("DEL", **changes) == Outcome(0, None, "")


def test_the_log_is_bounded_and_one_that_cannot_be_written_is_passed_over(
    cni: Plugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plugin, "MAX_LOG_BYTES", 10)
    log = tmp_path / "log"
    for _ in range(3):
        cni.run("ADD", prevResult=..., logFile=str(log))
    assert len(log.read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert_error(cni.run("ADD", prevResult=..., logFile=str(tmp_path)), 7, "prevResult")
