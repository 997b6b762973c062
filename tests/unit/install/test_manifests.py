# SPDX-License-Identifier: Apache-2.0
"""The chart, the plain manifests that it renders to, and what they ask of a cluster."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from enforcer_daemon.__main__ import main as enforcer
from enforcer_daemon.dataplane.netns import HOST_SYSCTL_DIR
from enforcer_daemon.settings_file import decode_settings
from install.render import CHART, HERE, RENDERED, render
from trireme_install.__main__ import DEFAULT_RUN_DIR
from trireme_install.__main__ import main as installer

ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = ("1.28", "1.37")
CHANGES: tuple[dict[str, Any], ...] = ({}, {"uninstall": True}, {"signer": False}, {"mode": "owned"})


def objects(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(text) if found}


def pod_of(found: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_the_plain_manifests_are_what_the_chart_renders_to(name: str) -> None:
    assert (HERE / name).read_text() == render(RENDERED[name]), "run `make manifests`"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_every_object_is_what_kubernetes_takes(version: str, changed: dict[str, Any]) -> None:
    for found in objects(render(changed)).values():
        kubernetes_validate.validate(found, version, strict=True)


def test_a_template_beyond_what_is_rendered_here_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "values.yaml").write_text("a: 1\n")
    monkeypatch.setattr("install.render.CHART", tmp_path)
    for text in ("a: {{ .Values.a | quote }}\n", "{{- if .Values.a }}\na: 1\n"):
        (tmp_path / "templates" / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"more than this renders|no `end`"):
            render({})


def test_versions_are_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (PROJECT["version"], PROJECT["version"])
    assert values["image"] == f"trireme:{PROJECT['version']}"


def test_every_value_is_used() -> None:
    templates = "\n".join(path.read_text() for path in (CHART / "templates").glob("*.yaml"))
    used = set(re.findall(r"\.Values\.(\w+)", templates))
    assert used == set(yaml.safe_load((CHART / "values.yaml").read_text()))


def test_an_enforcer_has_the_privileges_that_it_needs_and_no_others() -> None:
    pod = pod_of(objects(render({}))["DaemonSet", "trireme-enforcer"])
    assert (pod["hostNetwork"], pod["priorityClassName"]) == (True, "system-node-critical")
    assert not pod.keys() & {"hostPID", "hostIPC"}
    assert pod["tolerations"] == [{"operator": "Exists"}]
    by_name = {container["name"]: container for container in pod["containers"]}
    assert by_name["enforcer"]["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["SYS_ADMIN", "NET_ADMIN", "NET_RAW"],
    }
    assert by_name["installer"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for container in by_name.values():
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert "privileged" not in container["securityContext"]
        assert "cpu" not in container["resources"]["limits"]


def test_one_enforcer_at_a_time_runs_on_a_node() -> None:
    strategy = objects(render({}))["DaemonSet", "trireme-enforcer"]["spec"]["updateStrategy"]
    assert strategy["rollingUpdate"]["maxSurge"] == 0


def test_removal_takes_the_plugin_out_before_the_rules_and_leaves_no_enforcer() -> None:
    daemon_set = objects(render({"uninstall": True}))["DaemonSet", "trireme-enforcer"]
    assert daemon_set["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "100%"}
    pod = pod_of(daemon_set)
    steps = [[*container["command"], *container.get("args", ())] for container in pod["initContainers"]]
    assert [(step[0], step[-1]) for step in steps] == [
        ("trireme-install", "uninstall"),
        ("trireme-enforcer", "--uninstall"),
    ]
    assert [container["name"] for container in pod["containers"]] == ["installer"]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_every_volume_is_there_and_every_command_exists(changed: dict[str, Any]) -> None:
    for (kind, _), found in objects(render(changed)).items():
        if kind not in ("DaemonSet", "Deployment"):
            continue
        pod = pod_of(found)
        volumes = {volume["name"] for volume in pod["volumes"]}
        containers = [*pod.get("initContainers", ()), *pod["containers"]]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert volumes == mounted
        for container in containers:
            assert container["command"][0] in {*PROJECT["scripts"], "trireme-signer"}


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_the_installer_understands_its_arguments(changed: dict[str, Any]) -> None:
    pod = pod_of(objects(render(changed))["DaemonSet", "trireme-enforcer"])
    arguments = next(c["args"] for c in pod["containers"] if c["name"] == "installer")
    done = CliRunner().invoke(installer, [*arguments, "--help"])
    assert done.exit_code == 0
    words = {word.split("=")[0] for word in arguments if word.startswith("--")}
    shown = done.output + CliRunner().invoke(installer, ["--help"]).output
    assert all(word in shown for word in words)


def test_doctor_finds_in_the_installers_container_what_it_looks_at() -> None:
    pod = pod_of(objects(render({}))["DaemonSet", "trireme-enforcer"])
    of_installer = next(container for container in pod["containers"] if container["name"] == "installer")
    mounts = {mount["mountPath"]: mount for mount in of_installer["volumeMounts"]}
    assert {"/etc/cni/net.d", "/opt/cni/bin", DEFAULT_RUN_DIR} <= mounts.keys()
    assert mounts[DEFAULT_RUN_DIR]["readOnly"] is True


def test_another_signer_takes_the_place_of_ours() -> None:
    """As docs/keys.md says for cert-manager."""
    credentials = {"source": "kubernetes", "signerName": "clusterissuers.cert-manager.io/trireme"}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = objects(render({"signer": False, "settings": {**values["settings"], "credentials": credentials}}))
    assert not any("signer" in name for _, name in found)
    text = found["ConfigMap", "trireme-enforcer"]["data"]["enforcer.yaml"]
    assert decode_settings({**yaml.safe_load(text), "node": "n"}).credentials.signer_name == credentials["signerName"]
    asked = [rule["resources"] for rule in found["ClusterRole", "trireme-enforcer"]["rules"]]
    assert ["certificatesigningrequests"] in asked
    [rule] = found["Role", "trireme-enforcer"]["rules"]
    assert (rule["resources"], rule["resourceNames"]) == (["configmaps"], ["trireme-trust-bundle"])


def test_enforcers_whose_certificates_others_bring_may_not_ask_for_any() -> None:
    found = objects(render({"signer": False, "certificateRequests": False}))
    rules = [rule for (kind, _), role in found.items() if kind in ("Role", "ClusterRole") for rule in role["rules"]]
    assert not any({"certificatesigningrequests", "configmaps"} & set(rule["resources"]) for rule in rules)


def test_the_nodes_name_comes_from_the_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enforcer.yaml").write_text("trustDomain: cluster.local\n")
    check = ["--check-config", "--config", str(tmp_path / "enforcer.yaml")]
    assert CliRunner().invoke(enforcer, check).exit_code == 2
    monkeypatch.setenv("TRIREME_NODE", "node-7")
    assert CliRunner().invoke(enforcer, check).exit_code == 0


WORKLOADS = ("DaemonSet", "Deployment")


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_a_changed_config_restarts_what_reads_it_and_nothing_else(changed: dict[str, Any]) -> None:
    """Each pod template states the checksum of the ConfigMap that it mounts; what reads none has its config in args."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    settings = {**values["settings"], "denyWith": "reset"}
    before, after = objects(render(changed)), objects(render({**changed, "settings": settings}))
    for key, found in before.items():
        if key[0] in WORKLOADS:
            is_read = any("configMap" in volume for volume in pod_of(found)["volumes"])
            assert ("checksum/config" in annotations_of(found)) == is_read
            assert (found != after[key]) == is_read


def test_the_signers_config_is_in_its_pod_template() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    settings = {**values["settings"], "trustDomain": "other.example"}
    key = "Deployment", "trireme-signer"
    assert objects(render({}))[key] != objects(render({"settings": settings}))[key]


def annotations_of(found: dict[str, Any]) -> dict[str, str]:
    annotations: dict[str, str] = found["spec"]["template"]["metadata"].get("annotations", {})
    return annotations


def test_the_enforcer_takes_its_settings() -> None:
    text = objects(render({}))["ConfigMap", "trireme-enforcer"]["data"]["enforcer.yaml"]
    settings = decode_settings({**yaml.safe_load(text), "node": "node-7"})
    assert settings.kubernetes.enabled
    assert settings.registration.cni_results_dir == Path("/var/lib/cni/results")


def test_no_rule_grants_everything() -> None:
    for (kind, _), found in objects(render({})).items():
        if kind in ("Role", "ClusterRole"):
            for rule in found["rules"]:
                assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
                is_secret = "secrets" in rule["resources"] and rule["verbs"] != ["create"]
                assert not is_secret or rule["resourceNames"] == ["trireme-authority"]
    daemon = objects(render({}))["ClusterRole", "trireme-enforcer"]["rules"]
    assert not any("secrets" in rule["resources"] for rule in daemon)


def test_the_enforcer_can_set_what_is_below_its_sysctl_directory() -> None:
    found = objects(render({}))
    pod = pod_of(found["DaemonSet", "trireme-enforcer"])
    volume = next(v["name"] for v in pod["volumes"] if v.get("hostPath", {}).get("path") == "/proc/sys/net")
    enforcer_ = next(container for container in pod["containers"] if container["name"] == "enforcer")
    mount = next(mount for mount in enforcer_["volumeMounts"] if mount["name"] == volume)
    assert mount == {"name": volume, "mountPath": str(HOST_SYSCTL_DIR)}
