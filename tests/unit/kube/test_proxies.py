# SPDX-License-Identifier: Apache-2.0
"""Which proxy leads to the API server, as Go's httpproxy reads the environment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.kube.client import ApiError, ClusterApi
from enforcer_daemon.kube.proxies import is_bypassed, proxy_for
from tests.kube.api import FakeApi

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("host", "no_proxy", "bypassed"),
    [
        ("api.example.com", "", False),
        ("api.example.com", "*", True),
        ("api.example.com", "example.com", True),
        ("example.com", "example.com", True),
        ("badexample.com", "example.com", False),
        ("api.example.com", ".example.com", True),
        ("example.com", ".example.com", False),
        ("api.example.com", "*.example.com", True),
        ("example.com", "*.example.com", False),
        ("API.Example.com", " other , EXAMPLE.com ", True),
        ("api.example.com", "example.com:6443", True),
        ("api.example.com", "example.com:443", False),
        ("10.96.0.1", "10.96.0.0/12", True),
        ("10.96.0.1", "10.96.5.5/12", True),
        ("10.1.0.1", "10.96.0.0/12", False),
        ("10.96.0.1", "10.96.0.1", True),
        ("10.96.0.1", "10.96.0.1:6443", True),
        ("10.96.0.1", "10.96.0.1:443", False),
        ("fd00::1", "fd00::/16", True),
        ("fd00::1", "fd00::1", True),
        ("fd00::1", "[fd00::1]:6443", True),
        ("fd00::1", "[fd00::1]:443", False),
        ("api.example.com", "10.0.0.0/8", False),
        ("10.96.0.1", "10.96.0.0/99", False),
        ("10.96.0.1", ",,", False),
        ("localhost", "", True),
        ("127.0.0.53", "", True),
        ("::1", "", True),
    ],
)
def test_no_proxy_names_hosts_as_for_go(host: str, no_proxy: str, bypassed: bool) -> None:
    assert is_bypassed(host, 6443, no_proxy) is bypassed


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"HTTPS_PROXY": PROXY}, PROXY),
        ({"https_proxy": PROXY}, PROXY),
        ({"HTTPS_PROXY": PROXY, "https_proxy": "http://other"}, PROXY),
        ({"HTTPS_PROXY": "proxy.example:3128"}, PROXY),
        ({"HTTP_PROXY": PROXY}, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "example.com"}, None),
        ({"HTTPS_PROXY": PROXY, "no_proxy": "example.com"}, None),
        ({}, None),
    ],
)
def test_the_proxy_is_that_of_the_scheme(environment: dict[str, str], found: str | None) -> None:
    assert proxy_for("https://api.example.com:6443", environment) == found


def test_a_proxy_of_another_kind_is_refused() -> None:
    with pytest.raises(SettingsError, match="HTTPS_PROXY: must be a URL of http or https"):
        proxy_for("https://api.example.com", {"HTTPS_PROXY": "socks5://proxy"})


@pytest.mark.parametrize("no_proxy", ["", ".invalid"])
def test_the_client_asks_by_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_proxy: str) -> None:
    """The fake server serves as the proxy too; without one the server's name does not exist."""
    with FakeApi() as api:
        path = api.write_kubeconfig(tmp_path / "kubeconfig")
        config = yaml.safe_load(path.read_text())
        config["clusters"][0]["cluster"]["server"] = "http://api.cluster.invalid"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setenv("HTTP_PROXY", api.url)
        monkeypatch.setenv("NO_PROXY", no_proxy)

        async def ask() -> bytes:
            client = ClusterApi(path, tmp_path / "scratch")
            await client.open()
            try:
                return await client.get("/api/v1/namespaces", {}, 5.0)
            finally:
                await client.close()

        if no_proxy:
            with pytest.raises(ApiError, match="does not answer"):
                asyncio.run(ask())
        else:
            assert b'"items"' in asyncio.run(ask())
