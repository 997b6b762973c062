# SPDX-License-Identifier: Apache-2.0
"""Keys, certificates and trust bundles that change under traffic, two trust domains, and clocks that disagree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from enforcer_daemon.handshake.frames import SynAckFrame, decode_block, decode_syn, decode_syn_ack, is_frame
from enforcer_daemon.handshake.local import LocalToken, sign_local_token
from enforcer_daemon.identity.authority import Authority, issue_credential, node_spiffe_id
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.model import IPAddress
from enforcer_daemon.packet.tcp import ACK
from enforcer_daemon.reasons import Reason
from tests.e2e.attackers import FramedClient, Listener, Wire, await_denial, identity, ignore_raw_ports
from tests.e2e.key_world import (
    KeyFiles,
    Keys,
    await_that,
    certificate_pem,
    dialing,
    drops,
    key_pem,
    keyed_lab,
    new_authority,
)
from tests.e2e.operation_world import (
    HTTP,
    NODES,
    RESET,
    Stream,
    app,
    connection,
    denials,
    outcome,
    pod,
    policy,
    segments,
)
from trireme_lab import HostSpec, Lab, LabSpec, NodeSpec, Outcome, Tools
from trireme_lab.manifests import object_ref
from trireme_lab.node import Node

pytestmark = pytest.mark.kernel

DENY = policy("deny-all", ingress=[])
ALLOW = policy("allow", "server", ingress=[{"from": [app("client")]}])
BACK = policy("back", "client", ingress=[{"from": [app("server")]}])
POLICIES = (DENY, ALLOW, BACK)
PODS = (pod("client", "a"), pod("server", "b"))
BOTH_WAYS = (("x/client", "x/server"), ("x/server", "x/client"))
SHORT = {"tokenLifetimeSeconds": 8, "clockLeewaySeconds": 0}


# Renewal and rotation.


def test_keys_are_renewed_again_and_again_and_no_connection_notices(plugin: Path) -> None:
    settings = {"credentials": {**SHORT, "certificateLifetimeSeconds": 9}}
    world = LabSpec(NODES, pods=PODS, manifests=POLICIES, settings=settings)
    with (
        Lab(world, Tools(plugin=plugin)) as lab,
        connection(lab, "x/client", "x/server") as ends,
        Stream(*ends) as stream,
    ):
        with dialing(lab, *BOTH_WAYS):
            await_renewals(lab, 2)
        stream.wait_for_rounds(3)
        assert drops(lab) == {}
        keys = {(node.directories.state / "node.key").read_bytes() for node in lab.nodes.values()}
        assert len(keys) == 2


def await_renewals(lab: Lab, count: int) -> None:
    deadline = time.monotonic() + 30
    for node in lab.nodes.values():
        while sum(record["event"] == "certificate renewed" for record in node.log_records()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_authority_is_replaced_by_overlap_and_no_connection_notices(plugin: Path) -> None:
    """Node c is forgotten: it stays with the old authority, and is refused from the moment that nobody trusts it."""
    old, new = new_authority(), new_authority()
    keys = {name: Keys(old, [old]) for name in "abc"}
    pods = (*PODS, pod("late", "c", app="client"))
    nodes = (*NODES, NodeSpec.numbered("c", 3))
    world = LabSpec(nodes, manifests=POLICIES, settings={**RESET, "credentials": SHORT})
    with (
        keyed_lab(plugin, keys, world, pods) as (lab, files),
        connection(lab, "x/client", "x/server") as ends,
        connection(lab, "x/late", "x/server") as late_ends,
        Stream(*ends) as stream,
        Stream(*late_ends) as late_stream,
    ):
        with dialing(lab, *BOTH_WAYS):
            with dialing(lab, ("x/late", "x/server")):
                for name in "abc":  # first everybody believes both,
                    files[name].trust(old, new)
                    files[name].await_bundle(2)
                for name in "ab":  # then credentials are issued by the new one,
                    files[name].issue_by(new)
                    files[name].await_issuer(new)
            for name in "ab":  # and last nobody believes the old one any more.
                files[name].trust(new)
                files[name].await_bundle(1)
            assert outcome(lab, "x/late", "x/server", HTTP.number, timeout_s=0.5) is Outcome.TIMED_OUT
            assert denials(lab, "x/server")[-1] == "credential-untrusted"
        stream.wait_for_rounds(3)
        late_stream.wait_for_rounds(3)  # what was established before is not concerned
        assert set(drops(lab)["b"]) == {"credential-untrusted"}  # type: ignore[call-overload]


SUCCESSOR = new_authority()


@pytest.fixture(scope="module")
def rotating(plugin: Path) -> Iterator[tuple[Lab, KeyFiles]]:
    """Yield a lab whose node a trusts SUCCESSOR already, and the files of node b, which does not yet."""
    authority = new_authority()
    keys = {"a": Keys(authority, [authority, SUCCESSOR]), "b": Keys(authority, [authority])}
    with keyed_lab(plugin, keys, LabSpec(NODES, manifests=POLICIES, settings=RESET), PODS) as (lab, files):
        yield lab, files["b"]


def test_a_bad_file_is_refused_and_the_last_good_one_stays_in_force(rotating: tuple[Lab, KeyFiles]) -> None:
    lab, files = rotating
    good, other = files.bundle.read_bytes(), new_authority()
    bad = {
        "neither text nor PEM": b"\x00\xff",
        "empty": b"",
        "not the node's own authority": certificate_pem(other),
        "a key by mistake": key_pem(other),
    }
    with dialing(lab, *BOTH_WAYS):
        for what, content in bad.items():
            files.write(files.bundle, content)
            await_that(lambda: str(files.bundle) in files.problems() or "trustBundle" in files.problems())
            assert "BEGIN" not in files.problems(), what
            files.write(files.bundle, good)
            await_that(lambda: not files.problems())
        files.bundle.unlink()
        await_that(lambda: "No such file" in files.problems())
        assert _status(lab).returncode == 1
        files.write(files.bundle, good)
        await_that(lambda: not files.problems())
    lines = [record for record in lab.node("b").log_records() if record["event"].startswith("keys refused")]  # type: ignore[attr-defined]
    assert len(lines) == len(bad) + 1  # once for each, not once a second
    assert all("credentials.trustBundle" in str(line["problem"]) for line in lines)


def test_an_issuer_that_is_half_replaced_waits_for_its_other_half(rotating: tuple[Lab, KeyFiles]) -> None:
    lab, files = rotating
    certificate, key, bundle = (path.read_bytes() for path in (files.certificate, files.key, files.bundle))
    before = files.node_certificate()
    with dialing(lab, *BOTH_WAYS):
        files.write(files.certificate, certificate_pem(SUCCESSOR))
        await_that(lambda: "is not the key of" in files.problems())
        files.write(files.key, key_pem(SUCCESSOR))  # still no bundle has it: its credentials would not be believed
        await_that(lambda: "does not vouch" in files.problems())
        assert files.node_certificate() == before
        files.write(files.bundle, bundle + certificate_pem(SUCCESSOR))
        files.await_issuer(SUCCESSOR)
        files.write(files.certificate, certificate)
        files.write(files.key, key)
        files.write(files.bundle, bundle)
        files.await_bundle(1)


def test_a_hangup_ends_nothing(rotating: tuple[Lab, KeyFiles]) -> None:
    lab, files = rotating
    node = lab.node("b")
    os.kill(node.daemon.pid, signal.SIGHUP)
    assert outcome(lab, *BOTH_WAYS[0], HTTP.number) is Outcome.CONNECTED
    assert node.daemon.exit_status is None
    assert not files.problems()


def test_status_shows_credential_and_bundle(rotating: tuple[Lab, KeyFiles]) -> None:
    shown = _status(rotating[0])
    assert shown.returncode == 0
    for text in ("spiffe://cluster.local/node/b", "CN=trireme cluster.local", "trusted authority", "not after"):
        assert text in shown.stdout


def _status(lab: Lab) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "triremectl", "status", "--run-dir", str(lab.node("b").directories.run)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


# Two trust domains.


DOMAINS = {"a": "cluster.local", "b": "other.example"}
BY_DOMAIN = policy(
    "by-domain",
    "server",
    ingress=[
        {
            "from": [
                {
                    "namespaceSelector": {"matchLabels": {"trireme.io/trust-domain": DOMAINS["a"]}},
                    "podSelector": {"matchLabels": {"app": "client"}},
                }
            ]
        }
    ],
)


LIAR = HostSpec("liar", node="a")


@pytest.fixture(scope="module")
def domains(plugin: Path) -> Iterator[tuple[Lab, dict[str, Authority]]]:
    authorities = {name: new_authority(domain) for name, domain in DOMAINS.items()}
    everybody = list(authorities.values())
    keys = {name: Keys(authorities[name], everybody, {"trustDomain": DOMAINS[name]}) for name in DOMAINS}
    world = LabSpec(NODES, hosts=(LIAR,), manifests=(DENY, ALLOW), settings=RESET)
    with keyed_lab(plugin, keys, world, (*PODS, pod("near", "b", app="client"))) as (lab, _):
        ignore_raw_ports(lab, "host:liar")
        yield lab, authorities


def test_pods_of_another_trust_domain_are_admitted_by_its_name_alone(domains: tuple[Lab, object]) -> None:
    lab, _ = domains
    assert outcome(lab, "x/near", "x/server", HTTP.number) is Outcome.CONNECTED
    for version in (4, 6):
        assert outcome(lab, "x/client", "x/server", HTTP.number, version) is Outcome.REFUSED
        assert denials(lab, "x/server")[-1] == "ingress-denied"
    lab.apply(BY_DOMAIN)
    for version in (4, 6):
        assert outcome(lab, "x/client", "x/server", HTTP.number, version) is Outcome.CONNECTED
    lab.remove(object_ref(BY_DOMAIN))


def test_an_authority_cannot_name_nodes_of_another_trust_domain(domains: tuple[Lab, dict[str, Authority]]) -> None:
    """Node a's authority is trusted by node b, and still cannot make a pod of node b's own trust domain."""
    lab, authorities = domains
    with Wire(lab, "host:liar") as wire, Listener(lab, "x/server", 6000) as listener:
        for trust_domain, reason in (
            (DOMAINS["b"], Reason.CREDENTIAL_UNTRUSTED),
            (DOMAINS["a"], Reason.INGRESS_DENIED),
        ):
            token = _token(authorities["a"], trust_domain, wire.ip)
            FramedClient(wire, listener.ip, listener.port, token).send_framed_syn()
            await_denial(lab, "x/server", reason, 6000, address=wire.ip)
            assert listener.accepted() == []


def _token(authority: Authority, trust_domain: str, address: IPAddress) -> LocalToken:
    """Make the token of a client of this trust domain, as the holder of an authority can."""
    key, name = ec.generate_private_key(ec.SECP256R1()), node_spiffe_id(trust_domain, "b")
    certificate = issue_credential(authority, key.public_key(), name, datetime.now(UTC), timedelta(hours=1))
    stated = replace(identity([address], "b", "x/near", "client"), trust_domain=trust_domain)
    credential = decode_credential(certificate.public_bytes(Encoding.DER))
    now = time.time()
    return sign_local_token(stated, credential, key, X25519PrivateKey.generate(), os.urandom(9), (now, now + 600))


# Clocks that disagree.


SHIFTED = """
import sys, time
node, offset = {node!r}, {offset!r}
if f"/{{node}}/" in sys.argv[-1]:
    real = time.time
    time.time = lambda: real() + offset
from enforcer_daemon.__main__ import main
main()
"""
"""The enforcer, with the wall clock of one node set wrong."""


@pytest.mark.parametrize(
    ("offset_s", "at_server", "at_client"),
    [
        (20, None, None),
        (200, "token-expired", "token-not-yet-valid"),
        (3_600, "token-expired", "credential-expired"),
    ],
)
def test_a_clock_that_is_ahead(
    plugin: Path, tmp_path: Path, offset_s: float, at_server: str | None, at_client: str | None
) -> None:
    """The server's node is ahead: what comes to it is old, what it shows is from the future."""
    program = tmp_path / "shifted.py"
    program.write_text(SHIFTED.format(node="b", offset=offset_s))
    settings = {**RESET, "credentials": {"tokenLifetimeSeconds": 120}}
    world = LabSpec(NODES, pods=PODS, manifests=POLICIES, settings=settings)
    with Lab(world, Tools(plugin=plugin, enforcer=(sys.executable, str(program)))) as lab:
        for (source, target), reason in zip(BOTH_WAYS, (at_server, at_client), strict=True):
            expected = Outcome.CONNECTED if reason is None else Outcome.TIMED_OUT
            assert outcome(lab, source, target, HTTP.number, timeout_s=0.5 if reason else 3.0) is expected
            if reason is not None:
                assert denials(lab, target)[-1] == reason


# Nothing of it shows.


def test_no_key_and_no_token_shows_in_logs_and_answers(plugin: Path) -> None:
    """Also not where an operator puts a key into the wrong file, or a peer is refused."""
    authority, other = new_authority(), new_authority()
    keys = {name: Keys(authority, [authority]) for name in "ab"}
    settings = {**RESET, "log": {"level": "debug"}, "credentials": SHORT}
    world = LabSpec(NODES, manifests=POLICIES, settings=settings)
    with keyed_lab(plugin, keys, world, (*PODS, pod("stranger", "a"))) as (lab, files):
        secrets = [key_pem(authority), *(_private_bytes(name.key) for name in (authority, other))]
        secrets += [_private_value(node) for node in lab.nodes.values()]
        with lab.capture("x/server") as capture:
            for source in ("x/client", "x/stranger"):
                outcome(lab, source, "x/server", HTTP.number)
        secrets += _shown_on_the_wire(capture.packets())
        good = files["b"].bundle.read_bytes()
        for path in (files["b"].bundle, files["b"].certificate):
            before = path.read_bytes()
            files["b"].write(path, key_pem(other))
            await_that(lambda: bool(files["b"].problems()))
            _status(lab)
            files["b"].write(path, before)
            await_that(lambda: not files["b"].problems())
        assert files["b"].bundle.read_bytes() == good
        files["b"].trust(authority, other)
        files["b"].issue_by(other)
        files["b"].await_issuer(other)
        # Node a does not trust it.
        assert outcome(lab, "x/server", "x/client", HTTP.number, timeout_s=0.5) is Outcome.TIMED_OUT
        secrets += [_private_value(node) for node in lab.nodes.values()]
        told = _reported(lab)
    for text in ("flow allowed", "credential-untrusted", "ingress-denied", "certificate renewed", "keys refused"):
        assert text in told
    assert [secret for secret in secrets if _shows(secret, told)] == []


def test_the_search_finds_what_shows() -> None:
    secret = os.urandom(32)
    for before in range(3):
        text = os.urandom(before) + secret[5:]
        forms = (text.hex(), b64encode(text).decode(), urlsafe_b64encode(text).decode(), repr(text))
        assert all(_shows(secret, f"key={form}") for form in forms)
    assert not _shows(secret, b64encode(os.urandom(4_096)).decode())


def _reported(lab: Lab) -> str:
    """Return all that the daemons have said to anybody."""
    texts = [_status(lab).stdout]
    for node in lab.nodes.values():
        texts.append(node.log_text())
        texts += [json.dumps(node.admin(command)) for command in ("status", "endpoints", "metrics")]
    return "\n".join(texts)


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_numbers().private_value.to_bytes(32, "big")


def _private_value(node: Node) -> bytes:
    key = load_pem_private_key((node.directories.state / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return _private_bytes(key)


def _shown_on_the_wire(packets: Sequence[bytes]) -> list[bytes]:
    """Return tokens, and the proofs of both ends: seen by whoever sees packets, but for no log."""
    found = []
    for segment in segments(packets, HTTP.number):
        if is_frame(segment.payload):
            frame = decode_syn_ack(segment.payload) if segment.flags & ACK else decode_syn(segment.payload)
            _, token = decode_block(frame.block)
            found += [token, token[-64:], *([frame.proof] if isinstance(frame, SynAckFrame) else [])]
    assert len(found) >= 5
    return found


def _shows(secret: bytes, text: str) -> bool:
    """Return whether a piece of 12 bytes, wherever it begins, is in the text in any usual form."""
    if str(int.from_bytes(secret, "big")) in text:
        return True
    for at in range(0, len(secret) - 11, 12):
        piece = secret[at : at + 12]
        forms = {piece.hex(), piece.hex().upper(), piece.hex(":"), repr(piece)[2:-1], piece.decode("latin-1")}
        for skipped in range(3):  # base64 of a longer text: a piece may begin at any of three bytes
            whole = piece[skipped : skipped + 9]
            forms |= {encode(whole).decode() for encode in (b64encode, urlsafe_b64encode)}
        if any(form in text for form in forms):
            return True
    return False
