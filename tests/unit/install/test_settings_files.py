# SPDX-License-Identifier: Apache-2.0
"""What is made from the model of the settings: the example, the chart's schema and the page."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from enforcer_daemon.settings_file import SETTINGS, decode_settings, load_settings
from install.settings_files import CHART, EXAMPLE, FILES, ROOT, settings
from trireme_install.plan import Mode

VALUES = yaml.safe_load((ROOT / CHART / "values.yaml").read_text())
SCHEMA = json.loads((ROOT / CHART / "values.schema.json").read_text())


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_what_the_model_says(name: str) -> None:
    assert (ROOT / name).read_text() == FILES[name](), "run `make manifests`"


def test_every_setting_has_help_that_says_something() -> None:
    for setting in settings():
        assert re.fullmatch(r"[A-Z`].{20,}\.", setting.help), setting.key


def test_the_example_is_accepted_and_has_the_default_where_it_does_not_choose() -> None:
    path = ROOT / "conf/enforcer.yaml"
    assert load_settings(path).node == "node-1"
    tree = flat(yaml.safe_load(path.read_text()))
    default = flat(SETTINGS.dump_python(decode_settings({"node": "node-1"}), mode="json", by_alias=True))
    assert tree.keys() == default.keys()
    assert {key: value for key, value in tree.items() if value != default[key]} == {
        key: value for key, value in EXAMPLE.items() if key != "node"
    }


def test_links_of_the_page_lead_somewhere() -> None:
    for name in re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs/settings.md").read_text()):
        assert (ROOT / "docs" / name).is_file()


def test_the_schema_takes_the_charts_values_and_every_mode() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for mode in Mode:
        jsonschema.validate({**VALUES, "mode": mode.value}, SCHEMA)


def test_the_schema_takes_the_example() -> None:
    tree = yaml.safe_load((ROOT / "conf/enforcer.yaml").read_text())
    del tree["node"]
    jsonschema.validate({"settings": tree}, SCHEMA)


@pytest.mark.parametrize(
    "changed",
    [
        {"uninstal": True},
        {"mode": "replace"},
        {"settings": {"node": "n"}},
        {"settings": {"denyWiht": "reset"}},
        {"settings": {"stateDir": "relative"}},
        {"settings": {"kubernetes": {"enabled": "yes"}}},
        {"settings": {"dataplane": {"synRateLimitPerSource": 999}}},
        {"settings": {"credentials": {"tokenLifetimeSeconds": 86_401}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_enforcer_would(changed: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by their whole keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
