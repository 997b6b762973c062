# SPDX-License-Identifier: Apache-2.0
"""Render install/helm/trireme to plain manifests: `make manifests`.

The chart keeps to what this renders as Helm does: values in place, toYaml with nindent, the checksum of another
template, and if, else, end, each on a line of its own. Anything else is an error here. A checksum differs from Helm's,
whose YAML has other line breaks: both change whenever the template's values do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CHART = HERE / "helm" / "trireme"
NAMESPACE = "trireme"
RENDERED: Mapping[str, Mapping[str, Any]] = {"trireme.yaml": {}, "trireme-uninstall.yaml": {"uninstall": True}}
"""The plain manifests, with the values in which they differ from the chart's."""

_FIELD = r"\.(?:Values|Release)(?:\.\w+)+"
_CONTROL = re.compile(rf"\s*\{{\{{- (?:if (?P<negated>not )?(?P<field>{_FIELD})|(?P<word>else|end)) \}}\}}\Z")
_BLOCK = re.compile(rf"\s*\{{\{{- toYaml (?P<field>{_FIELD}) \| nindent (?P<indent>\d+) \}}\}}\Z")
_INLINE = re.compile(rf"\{{\{{ ({_FIELD}) \}}\}}")
_CHECKSUM = re.compile(r'\{\{ include \(print \$\.Template\.BasePath "/([\w.-]+)"\) \. \| sha256sum \}\}')
_HEADER = "# SPDX-License-Identifier: Apache-2.0\n# Made from install/helm/trireme by `make manifests`; change that.\n"


def render(changed: Mapping[str, Any]) -> str:
    """Render all templates with the chart's values, and these over them, after the namespace that Helm finds there."""
    values = {**yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), **changed}
    scope = {"Values": values, "Release": {"Namespace": NAMESPACE}}
    paths = sorted((CHART / "templates").glob("*.yaml"))
    parts = ["\n".join(_lines(path, scope)) for path in paths]
    namespace = (HERE / "namespace.yaml").read_text(encoding="utf-8").partition("\n")[2]
    return _HEADER + "".join(f"---\n{part.rstrip()}\n" for part in (namespace, *parts) if part.strip())


def _lines(path: Path, scope: Mapping[str, Any]) -> Iterator[str]:
    branches: list[bool] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if control := _CONTROL.match(line):
            _turn(branches, control, scope)
        elif all(branches):
            yield from _expand(line, scope, path)
    if branches:
        raise ValueError(f"{path}: an `if` has no `end`")


def _turn(branches: list[bool], control: re.Match[str], scope: Mapping[str, Any]) -> None:
    match control["word"]:
        case "else":
            branches[-1] = not branches[-1]
        case "end":
            branches.pop()
        case _:
            branches.append(bool(_look_up(control["field"], scope)) != bool(control["negated"]))


def _expand(line: str, scope: Mapping[str, Any], path: Path) -> Iterator[str]:
    if block := _BLOCK.match(line):
        text = yaml.safe_dump(_look_up(block["field"], scope), default_flow_style=False)
        yield from (" " * int(block["indent"]) + part for part in text.splitlines())
        return
    line = _CHECKSUM.sub(lambda found: _checksum(path.with_name(found[1]), scope), line)
    line = _INLINE.sub(lambda found: str(_look_up(found[1], scope)), line)
    if "{{" in line:
        raise ValueError(f"{path}: more than this renders: {line.strip()}")
    yield line


def _checksum(path: Path, scope: Mapping[str, Any]) -> str:
    return sha256("\n".join(_lines(path, scope)).encode()).hexdigest()


def _look_up(field: str, scope: Mapping[str, Any]) -> Any:
    value: Any = scope
    for name in field.split(".")[1:]:
        value = value[name]
    return value


if __name__ == "__main__":
    for name, changed in RENDERED.items():
        (HERE / name).write_text(render(changed), encoding="utf-8")
    sys.exit(0)
