# SPDX-License-Identifier: Apache-2.0
"""The documents agree with the code: reasons, settings, metrics, states, wire constants and the worked example."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import typing
from datetime import UTC, datetime
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.handshake import frames, machine, peers
from enforcer_daemon.handshake.flows import MAX_SETTLED_FLOWS
from enforcer_daemon.handshake.frames import SynAckFrame, SynFrame
from enforcer_daemon.handshake.machine import TRANSITIONS, Event, State
from enforcer_daemon.handshake.proofs import Transcript, frame_hash, initiator_proof, pair_key, responder_proof
from enforcer_daemon.identity.credential import TrustBundle, decode_credential
from enforcer_daemon.identity.tokens import MAX_CLAIMS_BYTES, Claims, decode_token
from enforcer_daemon.packet.tcp import OPTION_EXPERIMENT_1
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OWN_PACKAGES = ("cni_plugin", "enforcer_daemon", "triremectl")
ISSUED_AT = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
ISN_I, ISN_R = 0x01020304, 0x0A0B0C0D
NONCE_I, NONCE_R = bytes([0x11] * 16), bytes([0x22] * 16)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no fenced block {language}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables whose first cell is one word of code, by that word."""
    found = re.findall(r"^\| `([^`|]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in found}


# Reasons.


def test_reasons_table_is_the_closed_list() -> None:
    documented = rows(read("docs/reasons.md"))
    assert list(documented) == [reason.value for reason in Reason]
    assert {name: cells[0] for name, cells in documented.items()} == {reason.value: reason.text for reason in Reason}


def test_troubleshooting_covers_every_denial() -> None:
    allowing = {Reason.NOT_ISOLATED, Reason.POLICY, Reason.SELF, Reason.NODE}
    section = read("docs/operations.md").split("## Troubleshooting by reason")[1].split("\n## ")[0]
    assert [reason.value for reason in Reason if reason not in allowing and f"`{reason.value}`" not in section] == []


# Settings.


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def setting_defaults(group: type, prefix: str = "") -> dict[str, object]:
    """Every key with its default, as the file would write it."""
    hints, found = typing.get_type_hints(group), {}
    for declared in dataclasses.fields(group):
        key = prefix + camel(declared.name)
        if dataclasses.is_dataclass(hints[declared.name]):
            found |= setting_defaults(hints[declared.name], key + ".")
        elif declared.default is dataclasses.MISSING:
            found[key] = "required"
        else:
            found[key] = as_written(declared.default)
    return found


def as_written(value: object) -> str:
    if value is None:
        return "null"
    if value == ():
        return "`[]`"
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "value", value))


def test_settings_table_has_every_key_with_its_default() -> None:
    table = rows(read("docs/operations.md").split("## Settings")[1].split("\n## ")[0])
    assert {key: cells[0] for key, cells in table.items()} == setting_defaults(Settings)


# Metrics.


def test_metrics_table_has_every_metric() -> None:
    section = read("docs/operations.md").split("## Metrics")[1].split("\n## ")[0]
    metrics = Metrics()
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }
    assert {name: cells[0] for name, cells in rows(section).items()} == exposed


# The protocol.


def render_states() -> str:
    """The table of transitions as a diagram: one arrow for each pair of states, with its events."""
    arrows = ["stateDiagram-v2", "    [*] --> OPENING", "    [*] --> OFFERED"]
    for state, followers in TRANSITIONS.items():
        by_target: dict[State, list[Event]] = {}
        for event, target in followers.items():
            by_target.setdefault(target, []).append(event)
        for target, events in by_target.items():
            arrows.append(f"    {state.name} --> {target.name}: {', '.join(event.name.lower() for event in events)}")
    return "\n".join([*arrows, "    CLOSED --> [*]"])


def test_state_diagram_is_the_table() -> None:
    assert fenced(read("docs/protocol.md"), "mermaid") == render_states()


def test_first_states_of_the_diagram_have_no_predecessor() -> None:
    reached = {target for followers in TRANSITIONS.values() for target in followers.values()}
    assert set(machine.State) - reached == {State.OPENING, State.OFFERED}


def test_wire_constants() -> None:
    text = read("docs/protocol.md")
    for statement in (
        f"magic `{frames.MAGIC.hex(' ')}`",
        f"version: {frames.VERSION} |",
        f"type: {frames.TYPE_SYN} |",
        f"type: {frames.TYPE_SYN_ACK} |",
        f"at most {frames.MAX_FRAME_BYTES:,} |",
        f"| {frames.SYN_OVERHEAD} | rest | identity block |",
        f"| {frames.SYN_ACK_OVERHEAD} | rest | identity block |",
        f"| {frames.PROOF_BYTES} | proof_i |",
        f"kind {OPTION_EXPERIMENT_1} (RFC 4727)",
        f"length {frames.PROOF_OPTION_BYTES} |",
        f"`{frames.PROOF_EXID.hex(' ')}` on a segment",
        f"`{frames.LONE_PROOF_EXID.hex(' ')}` in an ACK",
        f"inflated claims | {MAX_CLAIMS_BYTES:,} bytes",
        f"for each pod and direction | {MAX_SETTLED_FLOWS:,} |",
        f"| {peers._MAX_CREDENTIALS:,}; {peers._MAX_REFUSED:,}; {peers._MAX_SOURCES:,} |",
    ):
        assert statement in text


def test_claims_table_is_what_a_token_states(example: Example) -> None:
    table = rows(read("docs/protocol.md").split("### Token")[1].split("### Proof option")[0])
    # The tables put claims that belong together in one row: `iat`, `exp`.
    named = {name.strip("` ") for row in re.findall(r"^\| (`.*?) \|", read("docs/protocol.md"), re.MULTILINE)
             for name in row.split(",")}  # fmt: skip
    assert "epk" in table
    assert set(example.claims_json()) | {"ports"} <= named


class Example:
    """The worked example: what the document states, and what the code makes of the first seven values."""

    def __init__(self, stated: dict[str, bytes]) -> None:
        self.stated = stated
        self.keys = {
            role[0]: X25519PrivateKey.from_private_bytes(sha256(f"trireme example {role}".encode()).digest())
            for role in ("initiator", "responder")
        }

    def block(self, role: str) -> bytes:
        return frames.encode_block(self.stated[f"credential_{role}"], self.stated[f"token_{role}"])

    def claims(self, role: str) -> Claims:
        credential = decode_credential(self.stated[f"credential_{role}"])
        authority = x509.load_der_x509_certificate(self.stated["authority"])
        TrustBundle([authority]).verify(credential, ISSUED_AT, 0.0)
        return decode_token(self.stated[f"token_{role}"], credential, ISSUED_AT, 0.0)

    def claims_json(self) -> dict[str, object]:
        document: dict[str, object] = json.loads(fenced(read("docs/protocol.md"), "json"))
        return document

    def computed(self) -> dict[str, bytes]:
        token_i, token_r = frame_hash(self.stated["token_i"]), frame_hash(self.stated["token_r"])
        key = pair_key(self.keys["i"], self.claims("r").ephemeral_key, token_i, token_r)
        transcript = Transcript(ISN_I, ISN_R, self.stated["nonce_i"], self.stated["nonce_r"])
        syn = frames.encode_syn(SynFrame(transcript.nonce_i, self.block("i")))
        blank = SynAckFrame(transcript.nonce_r, ip_address("10.85.2.2").packed, 5432, bytes(16), self.block("r"))
        proof_r = responder_proof(key, transcript, frame_hash(syn), frames.encode_syn_ack(blank))
        proof_i = initiator_proof(key, transcript, proof_r)
        return {
            "isn_i": ISN_I.to_bytes(4, "big"),
            "isn_r": ISN_R.to_bytes(4, "big"),
            "pair_key": key,
            "syn_head": syn[: frames.SYN_OVERHEAD],
            "syn_sha256": frame_hash(syn),
            "syn_ack_head": frames.encode_syn_ack(blank._replace(proof=proof_r))[: frames.SYN_ACK_OVERHEAD],
            "proof_r": proof_r,
            "proof_i": proof_i,
            "option": frames.proof_option(proof_i, is_lone=False),
        }


def read_example(text: str) -> dict[str, bytes]:
    stated: dict[str, str] = {}
    name = ""
    for line in fenced(text, "text example").splitlines():
        head, _, rest = line.partition(" ")
        name = head or name
        stated[name] = stated.get(name, "") + rest.strip()
    return {name: bytes.fromhex(digits) for name, digits in stated.items()}


def render_example(stated: dict[str, bytes]) -> str:
    lines = []
    for name, value in stated.items():
        for number, piece in enumerate(textwrap.wrap(value.hex(), 96)):
            lines.append(f"{'' if number else name:<14}{piece}")
    return "\n".join(lines)


@pytest.fixture
def example() -> Example:
    return Example(read_example(read("docs/protocol.md")))


def test_example_is_what_the_code_computes(example: Example) -> None:
    computed = example.computed()
    assert {name: example.stated[name] for name in computed} == computed


def test_example_is_the_same_for_the_responder(example: Example) -> None:
    hashes = frame_hash(example.stated["token_i"]), frame_hash(example.stated["token_r"])
    assert pair_key(example.keys["r"], example.claims("i").ephemeral_key, *hashes) == example.stated["pair_key"]


def test_example_names_its_pods(example: Example) -> None:
    web, db = example.claims("i"), example.claims("r")
    assert (str(web.identity.pod), web.identity.node, str(web.identity.ips[0])) == ("shop/web", "node-1", "10.85.1.2")
    assert (str(db.identity.pod), db.identity.node, str(db.identity.ips[0])) == ("shop/db", "node-2", "10.85.2.2")
    assert (web.issued_at, web.expires_at) == (ISSUED_AT, ISSUED_AT + 600)
    for role, claims in (("i", web), ("r", db)):
        assert example.keys[role].public_key().public_bytes_raw() == claims.ephemeral_key


def test_example_claims_are_those_of_the_token(example: Example) -> None:
    claims, stated = example.claims("i"), example.claims_json()
    assert stated["sub"] == f"ns/{claims.identity.pod.namespace}/sa/{claims.identity.service_account}"
    assert (stated["iss"], stated["node"]) == (claims.identity.trust_domain, claims.identity.node)
    assert (stated["labels"], stated["nsl"]) == (claims.identity.labels, claims.identity.namespace_labels)
    assert stated["ips"] == [str(ip) for ip in claims.identity.ips]
    assert (stated["iat"], stated["exp"]) == (claims.issued_at, claims.expires_at)


# All documents.


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_architecture_lists_every_package() -> None:
    text = read("ARCHITECTURE.md")
    packages = [
        found.parent.name
        for root in OWN_PACKAGES
        for found in (ROOT / root).rglob("__init__.py")
    ]  # fmt: skip
    assert [name for name in packages if f"{name}/" not in text] == []


def test_architecture_shows_the_layers_of_the_import_contract() -> None:
    layers = re.search(r"^layers = \[\n(.*?)^\]", read("pyproject.toml"), re.DOTALL | re.MULTILINE)
    assert layers is not None
    contract = re.findall(r'"([^"]+)"', layers[1])
    assert fenced(read("ARCHITECTURE.md"), "text layers").splitlines() == contract


def test_adrs_are_listed() -> None:
    listed = read("docs/adr/README.md")
    decisions = sorted(path.name for path in (ROOT / "docs/adr").glob("0*.md"))
    assert [name for name in decisions if f"({name})" not in listed] == []
    assert [int(name[:4]) for name in decisions] == list(range(1, len(decisions) + 1))


def test_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    text = read("README.md") + read("CONTRIBUTING.md")
    assert set(re.findall(r"(?:^|`| )make ([a-z-]+)\b(?=`|$| )", text, re.MULTILINE)) <= targets
