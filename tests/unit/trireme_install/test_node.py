# SPDX-License-Identifier: Apache-2.0
"""The installer as a program: once, staying, and taken away again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trireme_install.__main__ import main
from trireme_install.bundle import launcher_bundle
from trireme_install.errors import InstallError
from trireme_install.netd import Listing
from trireme_install.node import Keeper, Target, install, is_ready
from trireme_install.pace import IGNORED_AFTER_S, LONGEST_PAUSE_S, QUIET_S, Pace, Unreadable
from trireme_install.plan import Outcome

FLANNEL = Path(__file__).parents[2] / "vectors" / "netd" / "10-flannel.conflist"
WAIT_S = 30.0


def node(tmp_path: Path) -> tuple[Path, Path]:
    conf_dir, bin_dir = tmp_path / "net.d", tmp_path / "bin"
    conf_dir.mkdir()
    bin_dir.mkdir()
    (conf_dir / FLANNEL.name).write_bytes(FLANNEL.read_bytes())
    return conf_dir, bin_dir


def command(tmp_path: Path, *arguments: str) -> Result:
    places = ["--conf-dir", str(tmp_path / "net.d"), "--bin-dir", str(tmp_path / "bin")]
    return CliRunner().invoke(main, [*places, *arguments])


def chain(conf_dir: Path, name: str = FLANNEL.name) -> list[str]:
    return [plugin["type"] for plugin in json.loads((conf_dir / name).read_bytes())["plugins"]]


def test_the_network_that_cri_o_is_told_gets_the_entry(tmp_path: Path) -> None:
    conf_dir, bin_dir = node(tmp_path)
    (conf_dir / "00-first.conflist").write_text('{"cniVersion":"1.0.0","name":"first","plugins":[{"type":"bridge"}]}')
    crio = tmp_path / "crio"
    (crio / "crio.conf.d").mkdir(parents=True)
    settings = crio / "crio.conf.d" / "10-network.conf"
    name = json.loads(FLANNEL.read_bytes())["name"]
    settings.write_text(f'[crio.network]\ncni_default_network = "{name}"\n')
    target = Target(conf_dir, bin_dir, launcher_bundle("0.1.0"), runtime_configs=(crio,))
    assert install(target, lambda _: None).outcome is Outcome.INSTALLED
    assert "trireme" in chain(conf_dir)
    assert chain(conf_dir, "00-first.conflist") == ["bridge"]
    settings.write_text("[crio.network")
    with pytest.raises(InstallError, match=r"10-network.conf: not TOML"):
        install(target, lambda _: None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    places = ["--conf-dir", str(tmp_path / "net.d"), "--bin-dir", str(tmp_path / "bin")]
    ready = ["--ready-file", str(tmp_path / "ready")]
    program = [sys.executable, "-m", "trireme_install", *places, *arguments, *ready]
    process = subprocess.Popen(program, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_install_puts_the_program_and_the_entry_and_says_so(tmp_path: Path) -> None:
    conf_dir, bin_dir = node(tmp_path)
    done = command(tmp_path, "install", "--exclude-namespace", "kube-system", "--run-dir", "/run/x")
    assert done.exit_code == 0, done.output
    assert os.access(bin_dir / "trireme", os.X_OK)
    entry = json.loads((conf_dir / FLANNEL.name).read_bytes())["plugins"][-1]
    assert (entry["runDir"], entry["excludedNamespaces"]) == ("/run/x", ["kube-system"])
    again = command(tmp_path, "install", "--exclude-namespace", "kube-system", "--run-dir", "/run/x")
    said = f"installed: {FLANNEL.name}: network cbr0 has our plugin (merge)\n"
    assert (again.exit_code, again.stderr) == (0, said)


def test_without_the_program_the_configuration_stays_as_it_was(tmp_path: Path) -> None:
    conf_dir, bin_dir = node(tmp_path)
    bin_dir.rmdir()
    bin_dir.write_text("a read-only place")
    done = command(tmp_path, "install")
    assert done.exit_code == 1
    assert "--bin-dir" in done.stderr
    assert (conf_dir / FLANNEL.name).read_bytes() == FLANNEL.read_bytes()


def test_no_primary_yet_is_its_own_exit_status(tmp_path: Path) -> None:
    done = command(tmp_path, "install")
    assert done.exit_code == 3
    assert "waiting: no primary network is configured yet" in done.stderr


def test_what_is_refused_is_said_with_the_reason(tmp_path: Path) -> None:
    conf_dir, _ = node(tmp_path)
    (conf_dir / "05-single.conf").write_text('{"cniVersion":"1.0.0","name":"net","type":"bridge"}')
    done = command(tmp_path, "install")
    assert done.exit_code == 1
    assert "refused: 05-single.conf: a single plugin" in done.stderr


def test_uninstall_restores_the_chain_and_keeps_the_program_unless_told(tmp_path: Path) -> None:
    conf_dir, bin_dir = node(tmp_path)
    for mode in ("merge", "owned", "drop-in"):
        assert command(tmp_path, "install", "--mode", mode).exit_code == 0
        assert command(tmp_path, "uninstall").exit_code == 0
        assert {path.name for path in conf_dir.iterdir()} == {FLANNEL.name, ".trireme-install.lock"}
        assert json.loads((conf_dir / FLANNEL.name).read_bytes()) == json.loads(FLANNEL.read_bytes())
    assert (bin_dir / "trireme").exists()
    assert command(tmp_path, "uninstall", "--binary").exit_code == 0
    assert list(bin_dir.iterdir()) == []


def test_uninstall_refuses_while_an_installer_stays(tmp_path: Path) -> None:
    conf_dir, _ = node(tmp_path)
    with running(tmp_path, "run") as process:
        wait_for((tmp_path / "ready").exists)
        done = command(tmp_path, "uninstall")
        assert (done.exit_code, "another trireme-install" in done.stderr) == (1, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    assert chain(conf_dir)[-1] == "trireme"  # nothing is taken back at the end
    assert command(tmp_path, "uninstall").exit_code == 0


@pytest.mark.parametrize("is_atomic", [True, False])
def test_run_puts_the_entry_back_when_the_primary_rewrites_its_file(tmp_path: Path, *, is_atomic: bool) -> None:
    conf_dir, bin_dir = node(tmp_path)
    with running(tmp_path, "run", "--poll", "60"):  # so that only the watch can be the cause
        wait_for((tmp_path / "ready").exists)
        for cni_version in ("0.4.0", "1.0.0"):
            network = json.dumps({**json.loads(FLANNEL.read_bytes()), "cniVersion": cni_version})
            if is_atomic:
                (conf_dir / "new").write_text(network)
                (conf_dir / "new").rename(conf_dir / FLANNEL.name)
            else:
                (conf_dir / FLANNEL.name).write_text(network)
            wait_for(lambda: chain(conf_dir)[-1] == "trireme")
            assert json.loads((conf_dir / FLANNEL.name).read_bytes())["cniVersion"] == cni_version
        assert os.access(bin_dir / "trireme", os.X_OK)


def test_run_follows_a_directory_that_is_made_anew(tmp_path: Path) -> None:
    conf_dir, _ = node(tmp_path)
    with running(tmp_path, "run", "--poll", "0.2"):
        wait_for((tmp_path / "ready").exists)
        conf_dir.rename(tmp_path / "old")
        wait_for(lambda: not (tmp_path / "ready").exists())
        (tmp_path / "next").mkdir()
        (tmp_path / "next" / FLANNEL.name).write_bytes(FLANNEL.read_bytes())
        (tmp_path / "next").rename(conf_dir)
        wait_for(lambda: chain(conf_dir)[-1] == "trireme")
        wait_for((tmp_path / "ready").exists)


def test_run_is_not_ready_without_a_primary_and_polls_where_nothing_can_be_watched(tmp_path: Path) -> None:
    said: list[str] = []
    target = Target(tmp_path / "net.d", tmp_path / "bin", launcher_bundle("0.1.0"))

    async def story() -> None:
        keeper = Keeper(target, tmp_path / "ready", 0.05, said.append)
        work = asyncio.ensure_future(keeper.run())
        try:
            await asyncio.to_thread(wait_for, lambda: any(text.startswith("waiting") for text in said))
            assert not (tmp_path / "ready").exists()
            target.conf_dir.mkdir()
            (target.conf_dir / FLANNEL.name).write_bytes(FLANNEL.read_bytes())
            await asyncio.to_thread(wait_for, (tmp_path / "ready").exists)
        finally:
            work.cancel()
            await asyncio.wait([work])

    asyncio.run(story())
    assert chain(target.conf_dir)[-1] == "trireme"


def test_a_primary_that_never_stops_writing_is_an_error(tmp_path: Path) -> None:
    conf_dir, bin_dir = node(tmp_path)
    count = 0

    def primary_writes(text: str) -> None:
        nonlocal count
        count += 1
        if text.startswith("replace"):
            (conf_dir / FLANNEL.name).write_bytes(FLANNEL.read_bytes())

    with pytest.raises(InstallError, match="all the time"):
        install(Target(conf_dir, bin_dir, launcher_bundle("0.1.0")), primary_writes)
    assert count < 50


def test_ready_needs_a_recent_look(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    assert not is_ready(ready, 1.0)
    ready.touch()
    assert is_ready(ready, 1.0)
    os.utime(ready, (time.time() - 60, time.time() - 60))
    assert not is_ready(ready, 1.0)
    done = CliRunner().invoke(main, ["ready", "--ready-file", str(ready), "--poll", "1"])
    assert (done.exit_code, str(ready) in done.stderr) == (1, True)


def test_writings_that_follow_one_another_are_slowed_down_and_a_quiet_while_ends_it() -> None:
    pace, now, pauses = Pace(), 100.0, []
    for _ in range(10):
        pace = pace.after_writing(now)
        pauses.append(pace.wait_s(now))
        now += pauses[-1]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S)
    now += QUIET_S + LONGEST_PAUSE_S + 1
    assert pace.wait_s(now) == 0.0
    assert pace.after_writing(now).wait_s(now) == pytest.approx(pauses[0])


def test_a_file_counts_as_broken_only_after_a_while_and_not_once_it_is_mended() -> None:
    broken = Listing({"05.conflist": b"{", "10.conflist": FLANNEL.read_bytes()})
    seen = Unreadable().after_look(broken, 10.0)
    assert (seen.name, seen.ignored) == ("05.conflist", frozenset())
    assert seen.after_look(broken, 10.0 + IGNORED_AFTER_S / 2).ignored == frozenset()
    ignored = seen.after_look(broken, 10.0 + IGNORED_AFTER_S)
    assert ignored.ignored == {"05.conflist"}
    assert ignored.after_look(broken, 99.0).ignored == {"05.conflist"}
    mended = Listing({"05.conflist": FLANNEL.read_bytes()})
    assert ignored.after_look(mended, 99.0) == Unreadable()
