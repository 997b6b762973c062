# SPDX-License-Identifier: Apache-2.0
"""The documents agree with the code: reasons, limits, metrics, states, wire constants and the worked example."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from enforcer_daemon.dataplane.ruleset import rules_table
from enforcer_daemon.handshake import frames
from enforcer_daemon.handshake.fairtable import no_hits
from enforcer_daemon.handshake.lapse import TCP_LAPSE_S, UDP_LAPSE_S
from enforcer_daemon.handshake.leaseframes import LEASE_BYTES, LEASE_PORT
from enforcer_daemon.handshake.leasepairs import MAX_PAIRS
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.machine import TRANSITIONS, State, render_diagram
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.identity.tokens import MAX_CLAIMS_BYTES
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import OPTION_EXPERIMENT_1
from enforcer_daemon.reasons import Reason
from enforcer_daemon.telemetry.metrics import Metrics
from trireme_lab.scenario import load_scenario
from trireme_signer.metrics import REQUESTS

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OWN_PACKAGES = ("cni_plugin", "enforcer_daemon", "trireme_lab", "triremectl")
FOLDERS = (*OWN_PACKAGES, "benchmarks", "conf", "docs", "install", "tests")


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


# Rules.


def test_the_table_of_rules_is_the_list_that_the_renderers_use() -> None:
    shown = "\n".join(f"| {' | '.join(line)} |" for line in rules_table())
    assert f"| packet | direction | action |\n|---|---|---|\n{shown}\n" in read("docs/dataplane.md")


# Reasons.


def test_reasons_table_is_the_closed_list() -> None:
    documented = rows(read("docs/reasons.md"))
    assert list(documented) == [reason.value for reason in Reason]
    assert {name: cells[0] for name, cells in documented.items()} == {reason.value: reason.text for reason in Reason}


def test_troubleshooting_covers_every_denial() -> None:
    allowing = {Reason.NOT_ISOLATED, Reason.POLICY, Reason.SELF, Reason.NODE}
    section = read("docs/operations.md").split("## Troubleshooting by reason")[1].split("\n## ")[0]
    assert [reason.value for reason in Reason if reason not in allowing and f"`{reason.value}`" not in section] == []


# Limits.


def test_the_threat_model_states_every_limit_of_the_handshake() -> None:
    section = read("docs/threat-model.md").split("\n## Floods")[1].split("\n## ")[0]
    for field in dataclasses.fields(HandshakeLimits):
        if field.name != "clock_leeway_s":  # a setting
            assert f"`{field.name}`: {field.default:,.15g}" in section


# Metrics.


NO_METRICS = {"trireme_guard", "trireme_install", "trireme_lab", "trireme_signer"}
"""Other things whose names begin with the prefix of metrics: packages, and tables of nft."""


def exposed(families: Iterable[Metric]) -> dict[str, list[str]]:
    """Type and labels of each metric, by its name in the text format."""
    found = {}
    for family in families:
        names = {name: None for sample in family.samples for name in sample.labels if name != "le"}
        suffix = "_total" if family.type == "counter" else ""
        found[family.name + suffix] = [family.type, ", ".join(f"`{name}`" for name in names) or "none"]
    return found


def counted() -> Metrics:
    """Metrics with a sample of each."""
    metrics = Metrics(no_hits())
    metrics.decisions[Direction.INGRESS, False, Reason.POLICY] = 1
    metrics.guard_drops["spoofed-source"] = 1
    metrics.watch("pods", lambda: True, lambda: 0.0)
    return metrics


def of_signer() -> list[Metric]:
    REQUESTS.labels("signed")
    return [family for family in REGISTRY.collect() if family.name.startswith("trireme_")]


def test_metrics_table_is_what_is_exposed() -> None:
    section = read("docs/operations.md").split("## Metrics")[1].split("\n## ")[0]
    found = exposed([*counted().registry.collect(), *of_signer()])
    assert {name: cells[:2] for name, cells in rows(section).items()} == found


def test_metrics_have_the_products_prefix_and_base_units() -> None:
    for name in exposed([*counted().registry.collect(), *of_signer()]):
        assert re.fullmatch(r"trireme_[a-z_]+", name)
        assert not re.search(r"_(ms|milliseconds|us|minutes|kb|count)(_|$)", name)


def test_no_counter_has_a_created_series() -> None:
    assert "_created" not in counted().render()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_metrics_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = {*exposed([*counted().registry.collect(), *of_signer()]), *NO_METRICS}
    assert set(re.findall(r"`(trireme_[a-z_]+)[`{]", text)) - known == set()
    assert re.findall(r"`enforcer_(?!daemon)[a-z_]+", text) == []


# The protocol.


def test_state_diagram_is_the_table() -> None:
    assert fenced(read("docs/protocol.md"), "mermaid") == render_diagram()


def test_first_states_of_the_diagram_have_no_predecessor() -> None:
    reached = {to for state, followers in TRANSITIONS.items() for to in followers.values() if to is not state}
    assert set(TRANSITIONS) - reached == {State.OPENING, State.ASKED}


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
        f"version {frames.VERSION}, type {frames.TYPE_LEASE}, length",
        f"| {LEASE_BYTES} | rest | the sender's identity block",
        f"from port {LEASE_PORT:,} to\nport {LEASE_PORT:,}",
        f"IPv4 identification {frames.MARKER_ID:#06x}",
        f"After {UDP_LAPSE_S:.0f} s the pair's UDP flows lapse, after\n  {TCP_LAPSE_S:.0f} s its TCP connections",
        f"| pairs of a pod | {MAX_PAIRS:,};",
        f"kind {OPTION_EXPERIMENT_1} (RFC 4727)",
        f"length {frames.PROOF_OPTION_BYTES} |",
        f"`{frames.PROOF_EXID.hex(' ')}` on a segment",
        f"`{frames.STANDALONE_PROOF_EXID.hex(' ')}` in an ACK",
        f"inflated claims | {MAX_CLAIMS_BYTES:,} bytes",
    ):
        assert statement in text


def example() -> dict[str, bytes]:
    """What the document quotes, taken from the known answers (which tests/unit/handshake holds equal to the code)."""
    known = json.loads(read("tests/vectors/handshake/version-1.json"))
    sides = {"i": known["initiator"], "r": known["responder"]}
    values = {
        f"{name}_{role}": side[name] for name in ("ephemeral_private_key", "nonce") for role, side in sides.items()
    }
    values |= {f"isn_{role}": f"{side['isn']:08x}" for role, side in sides.items()}
    values["token_i"] = sides["i"]["token"]
    values |= {f"sha256_token_{role}": sha256_of(side["token"]) for role, side in sides.items()}
    values["sha256_dictionary"] = known["token_dictionary_sha256"]
    values["syn_head"] = known["syn_frame"][: 2 * frames.SYN_OVERHEAD]
    values["sha256_syn_frame"] = sha256_of(known["syn_frame"])
    values["syn_ack_head"] = known["syn_ack_frame"][: 2 * frames.SYN_ACK_OVERHEAD]
    values |= {name: known[name] for name in ("pair_key", "proof_r", "proof_i")}
    values |= {name: known[name] for name in ("proof_option", "standalone_proof_option")}
    return {name: bytes.fromhex(digits) for name, digits in values.items()}


def render_known(section: str) -> str:
    known = json.loads(read("tests/vectors/handshake/version-1.json"))[section]
    pieces = [(name, textwrap.wrap(digits, 64)) for name, digits in known.items()]
    return "\n".join(f"{'' if n else name:<26}{line}" for name, lines in pieces for n, line in enumerate(lines))


def test_example_of_datagrams_is_the_known_answer() -> None:
    assert fenced(read("docs/protocol.md"), "text datagrams") == render_known("datagrams")


def test_example_of_leases_is_the_known_answer() -> None:
    assert fenced(read("docs/protocol.md"), "text lease") == render_known("lease")


def sha256_of(digits: str) -> str:
    return sha256(bytes.fromhex(digits)).hexdigest()


def render_example() -> str:
    lines = []
    for name, value in example().items():
        for number, piece in enumerate(textwrap.wrap(value.hex(), 64)):
            lines.append(f"{'' if number else name:<26}{piece}")
    return "\n".join(lines)


def example_claims() -> dict[str, object]:
    """The payload of the example's token, as a reader of the document would take it out."""
    token = example()["token_i"]
    header_length, payload_length = int.from_bytes(token[:2], "big"), int.from_bytes(token[2:4], "big")
    payload = token[4 + header_length : 4 + header_length + payload_length]
    claims: dict[str, object] = json.loads(zlib.decompressobj(-15, TOKEN_DICTIONARY).decompress(payload))
    return claims


def test_example_is_the_known_answer() -> None:
    assert fenced(read("docs/protocol.md"), "text example") == render_example()


def test_example_claims_are_those_of_the_token() -> None:
    assert json.loads(fenced(read("docs/protocol.md"), "json")) == example_claims()


def test_claims_table_is_what_a_token_states() -> None:
    section = read("docs/protocol.md").split("| claim | content |")[1].split("\n### ")[0]
    named = {
        name for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == set(example_claims()) | {"ports", "uid"}


# All documents.


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_headings(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [(target, anchor) for target, anchor in links if "://" not in target]
    assert [link for link in local if link[1] not in anchors(path.parent / link[0] if link[0] else path)] == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.*-]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize(("page", "least"), [("tcp", 30), ("udp", 25)])
def test_odd_cases_name_tests_that_exist(page: str, least: int) -> None:
    text = read(f"docs/{page}.md")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", text, re.MULTILINE)
    cases = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| case |")]
    assert len(named) == len(cases) > least
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in read(path)] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_tests_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", path.read_text(encoding="utf-8"))
    assert [test for file, test in named if f"def {test}(" not in read(file)] == []


def test_every_claim_of_the_threat_model_names_a_test() -> None:
    section = read("docs/threat-model.md").split("## Claims")[1].split("\n## ")[0]
    claims = re.findall(r"^\| (?!attack )(.+) \|$", section, re.MULTILINE)
    assert len(claims) > 20
    assert [claim for claim in claims if not re.search(r"`tests/[\w/]+\.py::test_\w+`", claim)] == []


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


def test_readme_shows_the_demo_as_it_runs() -> None:
    shown, steps = fenced(read("README.md"), "text"), load_scenario("demo").steps
    numbered = {f"{number}. {step.title}" for number, step in enumerate(steps, 1)}
    assert set(re.findall(r"^\d+\. .*$", shown, re.MULTILINE)) <= numbered
    total = sum(len(step.flows) for step in steps)
    assert shown.splitlines()[-1] == f"{total} of {total} flows as expected"
