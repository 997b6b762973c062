# SPDX-License-Identifier: Apache-2.0
"""Write what says the same as the model of the settings: `make manifests`.

conf/enforcer.yaml, the chart's values.schema.json and the table in docs/settings.md come from the fields, ranges,
defaults and help of `enforcer_daemon/settings.py`, which is the one place to change.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from enforcer_daemon.settings_file import SETTINGS

ROOT = Path(__file__).parents[1]
CHART = Path("install/helm/trireme")
EXAMPLE: Mapping[str, object] = {
    "node": "node-1",
    "policyDir": "/etc/trireme/policy",
    "credentials.caCertificate": "/etc/trireme/ca.pem",
    "credentials.caKey": "/etc/trireme/ca-key.pem",
    "networks.enforced": ["10.85.0.0/16", "fd85::/16"],
    "networks.virtual": ["10.96.0.0/12", "fd96::/108"],
    "registration.excludedNamespaces": ["kube-system"],
    "registration.cniResultsDir": "/var/lib/cni/results",
}
"""Where conf/enforcer.yaml has another value than the default."""
_MODES = ["merge", "owned", "drop-in"]
_WIDTH = 120
_BEGIN, _END = "<!-- made by `make manifests` -->\n", "<!-- end -->\n"
_TYPES = {bool: "boolean", int: "integer", str: "string", dict: "object"}
_MAX_SECONDS = 1e9  # What only excludes mistakes is no range to tell people.

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One key as the documents show it."""

    key: str
    """With its group: `credentials.source`."""
    default: object
    """As in the file; `...` if the key is required."""
    help: str


def settings() -> Iterator[Setting]:
    """Yield every setting in the order of the model."""
    root = _schema()
    for name, field in root["properties"].items():
        if (group := _group(root, field)) is None:
            yield _setting(name, field)
        else:
            for inner, schema in group["properties"].items():
                yield _setting(f"{name}.{inner}", schema)


def example_file() -> str:
    """Return conf/enforcer.yaml."""
    root = _schema()
    known = {setting.key: setting for setting in settings()}
    lines = [
        "# Settings of trireme-enforcer: an example with every key; what is left out has its default.",
        "# An unknown key is an error. Paths are absolute. Made by `make manifests` from enforcer_daemon/settings.py.",
        "",
    ]
    for name, field in root["properties"].items():
        if (group := _group(root, field)) is None:
            lines += _entry(known[name], "")
        else:
            lines += ["", *_comment(group["description"], ""), f"{name}:"]
            for inner in group["properties"]:
                lines += _entry(known[f"{name}.{inner}"], "  ")
    return "\n".join(lines) + "\n"


def values_schema() -> str:
    """Return the chart's values.schema.json, by which Helm checks what users set."""
    values = yaml.safe_load((ROOT / CHART / "values.yaml").read_text(encoding="utf-8"))
    properties: Schema = {name: {"type": _TYPES[type(value)]} for name, value in values.items()}
    properties["mode"] = {"enum": _MODES}
    properties["global"] = {"type": "object"}  # Helm's own.
    root = _schema()
    definitions = root.pop("$defs")
    del root["properties"]["node"], root["required"]  # Each pod's own: the DaemonSet names it.
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, "settings": root},
        "$defs": definitions,
    }
    return json.dumps(schema, indent=2) + "\n"


def document() -> str:
    """Return docs/settings.md with its table."""
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    head, rest = text.split(_BEGIN)
    rows = [f"| `{s.key}` | {_shown(s.default)} | {_linked(s.help)} |" for s in settings()]
    table = "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])
    return f"{head}{_BEGIN}{table}\n{_END}{rest.split(_END)[1]}"


FILES: Mapping[str, Callable[[], str]] = {
    "conf/enforcer.yaml": example_file,
    f"{CHART}/values.schema.json": values_schema,
    "docs/settings.md": document,
}
"""Each file with what it must contain."""


def _schema() -> Schema:
    schema: Schema = _plain(SETTINGS.json_schema())
    return schema


def _plain(schema: Any) -> Any:
    """Drop pydantic's titles, put descriptions on one line, and say of paths that they are absolute."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _plain(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    if isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split())
    if found.get("format") == "path":
        found = {**found, "pattern": "^/"}
    if "default" in found:
        found["default"] = _number(found["default"])
    for key in ("minimum", "maximum"):
        if key in found:
            found[key] = _number(found[key])
    return found


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _group(root: Schema, field: Schema) -> Schema | None:
    """Return the group that a field of the root stands for; None: it is a setting."""
    group = root["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
    return group if "properties" in group else None


def _setting(key: str, schema: Schema) -> Setting:
    return Setting(key, schema.get("default", ...), schema["description"] + _range(schema))


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    high = None if high is None or high >= _MAX_SECONDS else high
    if low and high is not None:
        return f" Range: {low:,} to {high:,}."
    if high is not None:
        return f" At most {high:,}."
    return f" At least {low:,}." if low else ""


def _entry(setting: Setting, indent: str) -> list[str]:
    value = EXAMPLE.get(setting.key, setting.default)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return [*_comment(setting.help, indent), f"{indent}{setting.key.rpartition('.')[2]}: {text}"]


def _comment(text: str, indent: str) -> list[str]:
    text = text.replace("**", "")
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _shown(default: object) -> str:
    if default is ...:
        return "required"
    return "`[]`" if default == [] else json.dumps(default).strip('"')


def _linked(text: str) -> str:
    """Turn `(docs/keys.md#clocks)` into a link from one page to another."""
    return re.sub(r"docs/(([\w-]+)\.md(?:#[\w-]+)?)", r"[\2](\1)", text)


if __name__ == "__main__":
    for name, content in FILES.items():
        (ROOT / name).write_text(content(), encoding="utf-8")
    sys.exit(0)
