# SPDX-License-Identifier: Apache-2.0
"""`triremectl validate`: do Kubernetes and the daemon accept these manifests? Says which field is at fault."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from enforcer_daemon.policy.cluster_objects import Channel
from enforcer_daemon.sources.limits import limit_problems
from enforcer_daemon.sources.manifests import (
    ManifestFile,
    MoreKinds,
    decode_file,
    manifest_files,
    read_file,
    unique_objects,
)
from triremectl.output import printable


@click.command("validate")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--experimental", is_flag=True, help="Check cluster policies against the experimental channel of their CRD."
)
def command(paths: tuple[Path, ...], *, experimental: bool) -> None:
    """Check manifests as the Kubernetes API server and the daemon do.

    NetworkPolicy, ClusterNetworkPolicy, Namespace and Pod are read. Limits on sums count for what is given: those of a
    pod only if the pod is among it. PATHS are YAML or JSON files, directories of them, or - for standard input. Each
    problem is a line: file and line, object, field, message. The exit status is 0 if all is valid, else 1.
    """
    more = MoreKinds(cluster_policies=Channel.EXPERIMENTAL if experimental else Channel.STANDARD)
    files = [file for path in paths for file in _read(path, more)]
    found, problems = unique_objects(files)
    problems += limit_problems(found)
    for problem in problems:
        click.echo(printable(str(problem)))
    if not any(file.entries or file.problem for file in files):
        raise click.ClickException("no manifests there")
    at_fault = sum(entry.object is None for file in files for entry in file.entries)
    click.echo(f"{len(found)} valid, {at_fault} refused, in {len(files)} {'file' if len(files) == 1 else 'files'}")
    if cluster_policies := sum(key.kind == "ClusterNetworkPolicy" for key in found):
        click.echo(f"{cluster_policies} of them ClusterNetworkPolicy, which this enforcer does not enforce", err=True)
    if problems:
        sys.exit(1)


def _read(path: Path, more: MoreKinds) -> list[ManifestFile]:
    if str(path) == "-":
        return [decode_file("-", sys.stdin.buffer.read(), more)]
    try:
        return [read_file(file, more) for file in manifest_files(path)] if path.is_dir() else [read_file(path, more)]
    except OSError as err:
        raise click.ClickException(f"{path}: {err.strerror or err}") from err
