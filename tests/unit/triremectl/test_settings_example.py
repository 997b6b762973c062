# SPDX-License-Identifier: Apache-2.0
"""conf/enforcer.yaml, the settings file that operators start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import get_type_hints

import yaml

from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import load_settings

EXAMPLE = Path(__file__).parents[3] / "conf" / "enforcer.yaml"


def _keys(group: type, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        head, *rest = field.name.split("_")
        key = prefix + head + "".join(map(str.capitalize, rest))
        hint = hints[field.name]
        keys |= _keys(hint, key + ".") if dataclasses.is_dataclass(hint) else {key}
    return keys


def _keys_of_file(tree: Mapping[str, object], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys |= _keys_of_file(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


def test_the_example_is_accepted_and_has_every_key() -> None:
    settings = load_settings(EXAMPLE)
    assert settings.node == "node-1"
    assert _keys_of_file(yaml.safe_load(EXAMPLE.read_text())) == _keys(Settings)


def test_where_the_example_does_not_choose_it_shows_the_default() -> None:
    settings = load_settings(EXAMPLE)
    default = Settings(node="node-1")
    assert settings.handshake == default.handshake
    assert settings.dataplane == default.dataplane
    assert settings.log == default.log
    assert settings.state_dir == default.state_dir
    assert settings.deny_with == default.deny_with
