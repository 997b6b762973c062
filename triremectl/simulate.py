# SPDX-License-Identifier: Apache-2.0
"""`triremectl simulate`: who may reach whom, by policies that need not be in force anywhere."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

import click

from enforcer_daemon.model import Decision
from enforcer_daemon.policy import InvalidObjectError, Pod
from enforcer_daemon.policy.objects import LAST_PORT, IPBlock, NetworkPolicy, Service
from enforcer_daemon.sources.manifests import (
    ClusterState,
    MoreKinds,
    Problem,
    assemble,
    manifest_files,
    read_file,
    unique_objects,
)
from triremectl.cases import PROTOCOLS, WITH_IDENTITY, Case, CaseCluster, Probe, ProbeVerdict, decode_case
from triremectl.services import Backend, address_note, backends, find_service

_STAND_IN_ADDRESSES = IPv4Network("198.18.0.0/15")
"""For pods whose manifest has no address (RFC 2544: never anybody's)."""


@click.command("simulate")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, allow_dash=True))
@click.option("--explain", is_flag=True, help="Say for each probe which end decided, and by which policies and rules.")
@click.option("--check", is_flag=True, help="Compare with the expected verdicts; exit status 1 on any difference.")
@click.option("--policies", type=click.Path(path_type=Path), help="Directory or file of manifests, instead of cases.")
@click.option(
    "--pods", type=click.Path(path_type=Path), help="Directory or file of Pod, Namespace and Service manifests."
)
@click.option("--from", "source", help="Who connects: namespace/pod, or an address.")
@click.option("--to", "destination", help="To whom: namespace/pod, service:namespace/name, or an address.")
@click.option("--port", help="Destination port: a number, or a name that the destination gives it.")
@click.option("--protocol", type=click.Choice(list(PROTOCOLS), case_sensitive=False), default="TCP", show_default=True)
@click.option("--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer to --policies.")
def command(files: tuple[Path, ...], *, explain: bool, check: bool, policies: Path | None, pods: Path | None,
            source: str | None, destination: str | None, port: str | None, protocol: str,
            output: str) -> None:  # fmt: skip
    """Evaluate cases, or answer one question about manifests.

    FILES hold one case a line (JSON; .gz is unpacked; - or nothing: standard input): namespaces, pods, policies, and
    probes {from, to, port, protocol}. For each case one line of JSON comes out: its name and the verdicts of its
    probes, in their order.

    With --policies the question is --from, --to, --port and --protocol. The answer says what each end decides, and by
    which rules; exit status 0: allowed, 1: denied, 2: there is no answer. A Service among the manifests is decided for
    each pod behind it, by that pod's own labels and port; 0: allowed at all of them.
    """
    if policies is None:
        if pods or source or destination or port:
            raise click.UsageError("--pods, --from, --to and --port need --policies")
        if not files and sys.stdin.isatty():
            raise click.UsageError("give files of cases, cases on standard input, or a question with --policies")
        cases = read_cases(files or (Path("-"),))
        _check(cases) if check else _evaluate(cases, explain=explain)
        return
    if files or check:
        raise click.UsageError("--policies takes neither cases nor --check")
    if not (source and destination and port):
        raise click.UsageError("--policies needs --from, --to and --port")
    probe = Probe(source, destination, _port(port), PROTOCOLS[protocol.upper()])
    is_allowed = _answer(*_read_state(policies, pods), probe, is_json=output == "json")
    sys.exit(0 if is_allowed else 1)


def _port(text: str) -> int | str:
    if not text.lstrip("-").isdecimal():
        return text
    if not 1 <= int(text) <= LAST_PORT:
        raise click.BadParameter(f"must be 1 to {LAST_PORT}, or a name", param_hint="--port")
    return int(text)


class _NoAnswerError(click.ClickException):
    """Neither allowed nor denied: the question or the manifests are at fault."""

    exit_code = 2


def read_cases(files: Iterable[Path]) -> Iterator[Case]:
    """Read files of cases (.gz is unpacked, - is standard input); raise ClickException that names file and line."""
    for file in files:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                yield decode_case(json.loads(line))
            except InvalidObjectError as err:
                listed = "".join(f"\n  {problem.field}: {problem.message}" for problem in err.problems)
                raise click.ClickException(f"{file}:{number}: the case cannot be judged{listed}") from err
            except json.JSONDecodeError as err:
                raise click.ClickException(f"{file}:{number}: not JSON: {err.msg} (column {err.colno})") from err
            except ValueError as err:
                raise click.ClickException(f"{file}:{number}: {err}") from err


def _lines(file: Path) -> Iterator[str]:
    try:
        if str(file) == "-":
            yield from sys.stdin
            return
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as text:
            yield from text
    except OSError as err:
        raise click.ClickException(f"{file}: {err.strerror or err}") from err


def _verdict(case: Case, probe: Probe, *, explain: bool = False) -> ProbeVerdict:
    try:
        return case.cluster.evaluate(probe, explain=explain)
    except ValueError as err:
        raise click.ClickException(f"{case.name}: {probe}: {err}") from err


def _evaluate(cases: Iterable[Case], *, explain: bool) -> None:
    for case in cases:
        verdicts = [_verdict(case, probe, explain=explain) for probe in case.probes]
        line: dict[str, object] = {"name": case.name, "verdicts": [verdict.verdict for verdict in verdicts]}
        if explain:
            line["explanations"] = [
                _explanation(probe, verdict) for probe, verdict in zip(case.probes, verdicts, strict=True)
            ]
        click.echo(json.dumps(line, ensure_ascii=False))


def _explanation(probe: Probe, verdict: ProbeVerdict) -> dict[str, object]:
    return {
        "from": probe.source,
        "to": probe.destination,
        "port": probe.port,
        "protocol": probe.protocol.name,
        "verdict": verdict.verdict,
        "denied_by": verdict.denied_by,
        "egress": _decision(verdict.egress),
        "ingress": _decision(verdict.ingress),
        **({"limits": list(verdict.limits)} if verdict.limits else {}),
    }


def _decision(decision: Decision) -> dict[str, object]:
    return {
        "allowed": decision.is_allowed,
        "reason": decision.reason.value,
        "rules": [str(rule) for rule in decision.rules],
        **({"clusterRules": [str(rule) for rule in decision.cluster_rules]} if decision.cluster_rules else {}),
    }


@dataclass(slots=True)
class _Score:
    cases: int = 0
    probes: int = 0
    right: int = 0


def _check(cases: Iterable[Case]) -> None:
    score = _Score()
    for case in cases:
        score.cases += 1
        for probe in case.probes:
            if probe.expected is not None:
                score.probes += 1
                score.right += _is_as_expected(case, probe)
    click.echo(f"{score.right} of {score.probes} probes as expected ({score.cases} cases)")
    if score.right != score.probes or not score.probes:
        sys.exit(1)


def _is_as_expected(case: Case, probe: Probe) -> bool:
    verdict = _verdict(case, probe)
    if verdict.verdict == probe.expected and probe.denied_by in (None, verdict.denied_by):
        return True
    verdict = _verdict(case, probe, explain=True)
    expected = f"{probe.expected} (by {probe.denied_by})" if probe.denied_by else probe.expected
    found = f"{verdict.verdict} (by {verdict.denied_by})" if verdict.denied_by else verdict.verdict
    click.echo(f"{case.name}: {probe}: expected {expected}, found {found}")
    for line in in_words(probe, verdict):
        click.echo(f"  {line}")
    return False


def in_words(probe: Probe, verdict: ProbeVerdict) -> list[str]:
    """Return what each end of a probe decides, and by which rules."""
    return [
        f"egress of {probe.source}: {_decision_in_words(verdict.egress)}",
        f"ingress of {probe.destination}: {_decision_in_words(verdict.ingress)}",
        *(f"limit exceeded: {limit}" for limit in verdict.limits),
    ]


def _decision_in_words(decision: Decision) -> str:
    rules = ", ".join(str(rule) for rule in decision.rules)
    word = "allowed" if decision.is_allowed else "denied"
    named = ""
    if rules:
        named = f" by {rules}" if decision.is_allowed else f"; isolated by {rules}"
    asked = "".join(f"; {rule}" for rule in decision.cluster_rules)
    return f"{word} ({decision.reason.value}){named}{asked}"


def _read_state(policies: Path, pods: Path | None) -> tuple[ClusterState, list[Service]]:
    paths = [path for place in filter(None, (policies, pods)) for path in _files(place)]
    found, problems = unique_objects(read_file(path, MoreKinds(services=True)) for path in paths)
    if problems:
        raise _NoAnswerError(_listed(problems))
    objects = [entry for _, entry in found.values()]
    return assemble(objects, ()), [entry for entry in objects if isinstance(entry, Service)]


def _files(place: Path) -> list[Path]:
    try:
        return list(manifest_files(place)) if place.is_dir() else [place]
    except OSError as err:
        raise _NoAnswerError(f"{place}: {err.strerror or err}") from err


def _listed(problems: list[Problem]) -> str:
    return "the manifests are not valid" + "".join(f"\n  {problem}" for problem in problems)


def _answer(cluster: ClusterState, services: list[Service], probe: Probe, *, is_json: bool) -> bool:
    """Print the answer; return whether it is yes."""
    try:
        service = find_service(probe.destination, services)
        behind = [] if service is None else backends(probe, service, cluster.pods.values())
        # Only to rules by address does it matter which one a pod has.
        policies = [policy.load() for policy in cluster.policies]
        names = {probe.source, probe.destination, *(backend.shown.destination for backend in behind)}
        pods = list(_with_addresses(cluster.pods.values(), names if any(map(_names_addresses, policies)) else ()))
        nodes = {ip: pod.node for pod in pods if pod.is_on_host_network and pod.node for ip in pod.ips}
        cases = CaseCluster(pods, cluster.namespaces, policies, nodes)
        if service is not None:
            decided = [(backend, _best(cases, backend.probes)) for backend in behind]
            return _print_service(service, probe, decided, is_json=is_json)
        verdict = cases.evaluate(probe, explain=True, as_enforced=True)
    except ValueError as err:
        raise _NoAnswerError(str(err)) from err
    note = _unknown_port(pods, probe) or address_note(probe, services, pods) or _protocol_note(probe)
    if is_json:
        click.echo(json.dumps({**_explanation(probe, verdict), **({"note": note} if note else {})}, indent=2))
        return verdict.is_allowed
    click.echo(_in_one_line(probe, verdict))
    for line in (*in_words(probe, verdict), *filter(None, [note])):
        click.echo(f"  {line}")
    return verdict.is_allowed


def _best(cases: CaseCluster, probes: Sequence[Probe]) -> ProbeVerdict:
    """Return the verdict of the first probe that is allowed, else of the last."""
    verdicts = [cases.evaluate(probe, explain=True, as_enforced=True) for probe in probes]
    return next((verdict for verdict in verdicts if verdict.is_allowed), verdicts[-1])


def _in_one_line(probe: Probe, verdict: ProbeVerdict) -> str:
    return f"{probe}: {'allowed' if verdict.is_allowed else f'denied by {verdict.denied_by}'}"


def _print_service(
    service: Service, probe: Probe, behind: list[tuple[Backend, ProbeVerdict]], *, is_json: bool
) -> bool:
    """Print what is decided for each pod behind a Service; return whether all are reached."""
    allowed, total = sum(verdict.is_allowed for _, verdict in behind), len(behind)
    if is_json:
        found = [
            {**_explanation(backend.shown, verdict), **({"note": backend.note} if backend.note else {})}
            for backend, verdict in behind
        ]
        asked = {"from": probe.source, "to": probe.destination, "port": probe.port, "protocol": probe.protocol.name}
        word = "allow" if allowed == total else "mixed" if allowed else "deny"
        click.echo(json.dumps({**asked, "service": str(service), "verdict": word, "backends": found}, indent=2))
        return allowed == total
    how = f"allowed at {'all' if allowed == total else allowed} of" if allowed else "denied at all of"
    click.echo(f"{probe}: Service {service}: {how} its {total} {'pod' if total == 1 else 'pods'}")
    for backend, verdict in behind:
        click.echo(f"  {_in_one_line(backend.shown, verdict)}")
        for line in (*in_words(backend.shown, verdict), *filter(None, [backend.note])):
            click.echo(f"    {line}")
    return allowed == total


def _protocol_note(probe: Probe) -> str:
    if probe.protocol in WITH_IDENTITY:
        return ""
    return f"{probe.protocol.name} carries no identity: decided by addresses, which selectors do not match"


def _unknown_port(pods: Iterable[Pod], probe: Probe) -> str:
    """Say that the port is no name of the destination's: no rule can then mean it."""
    if isinstance(probe.port, int):
        return ""
    wanted = probe.port, probe.protocol
    for pod in pods:
        is_meant = probe.destination in (str(pod.ref), *map(str, pod.ips))
        if is_meant and wanted in ((port.name, port.protocol) for port in pod.named_ports):
            return ""
    return f"{probe.destination} has no {probe.protocol.name} port with the name {probe.port}"


def _names_addresses(policy: NetworkPolicy) -> bool:
    rules = (*(policy.ingress or ()), *(policy.egress or ()))
    return any(isinstance(peer, IPBlock) for rule in rules for peer in rule.peers)


def _with_addresses(pods: Iterable[Pod], told: Collection[str]) -> Iterator[Pod]:
    """Yield each pod an address; those of the pods in `told` are told."""
    spare = _STAND_IN_ADDRESSES.hosts()
    for pod in pods:
        if pod.ips:
            yield pod
            continue
        address = next(spare)
        if str(pod.ref) in told:
            click.echo(f"{pod.ref} has no address in its manifest; ipBlock rules see {address}", err=True)
        yield replace(pod, ips=(address,))
