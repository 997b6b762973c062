# SPDX-License-Identifier: Apache-2.0
"""What `trireme-install doctor` says of a node."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from trireme_install.__main__ import main
from trireme_install.doctor import Facts, Level, diagnose
from trireme_install.errors import InstallError
from trireme_install.examination import examine
from trireme_install.layouts import LAYOUTS, runtime_configs
from trireme_install.netd import Listing, Runtime
from trireme_install.plan import Mode, Wanted, apply_step, plan_install
from trireme_install.runtimes import RuntimeSettings, decode_containerd, decode_crio, merged

VECTORS = Path(__file__).parents[2] / "vectors" / "netd"
CALICO, FLANNEL, MULTUS = "10-calico.conflist", "10-flannel.conflist", "00-multus.conf"
CONTAINERD_2 = b"""
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/opt/cni/bin"
  conf_dir = "/etc/cni/net.d"
  max_conf_num = 1
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.sandboxed]
  runtime_type = "io.containerd.runsc.v1"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.odd]
  runtime_type = "io.containerd.runc.v2"
  cni_conf_dir = "/etc/cni/odd.d"
"""
CONTAINERD_3 = b"""
version = 3
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]
  conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
  runtime_type = "io.containerd.kata.v2"
"""


def listing(*names: str) -> Listing:
    return Listing({name: (VECTORS / name).read_bytes() for name in names})


def installed(start: Listing, mode: Mode = Mode.MERGE) -> Listing:
    for step in plan_install(start, Wanted(mode)).steps:
        start = apply_step(start, step)
    return start


def texts(where: Listing, level: Level, *runtimes: RuntimeSettings) -> str:
    known = runtimes or (RuntimeSettings(Runtime.CONTAINERD, "test", "/etc/cni/net.d", ("/opt/cni/bin",)),)
    facts = Facts("/etc/cni/net.d", "/opt/cni/bin", where, None, None, known)
    return "\n".join(finding.text for finding in diagnose(facts) if finding.level is level)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("primary", [CALICO, FLANNEL])
def test_an_installed_node_has_no_problem(primary: str, mode: Mode) -> None:
    where = installed(listing(primary), mode)
    assert texts(where, Level.PROBLEM) == ""
    assert "in the chain once: new pods are enforced" in texts(where, Level.OK)


def test_a_configuration_of_ours_that_does_not_sort_first_is_never_used() -> None:
    ours = (Path(__file__).parents[3] / "conf" / "10-trireme.conflist").read_bytes()
    where = Listing({**listing(FLANNEL).files, "10-trireme.conflist": ours})
    assert "10-flannel.conflist: our plugin is not in the chain: new pods are NOT enforced" in texts(
        where, Level.PROBLEM
    )


def test_a_broken_first_file_stops_containerd_and_not_cri_o() -> None:
    where = Listing({"05.conflist": b"{", **installed(listing(CALICO)).files})
    assert "containerd loads nothing" in texts(where, Level.PROBLEM)
    crio = RuntimeSettings(Runtime.CRIO, "test")
    assert texts(where, Level.PROBLEM, crio) == ""
    assert "CRI-O passes it over" in texts(where, Level.WARNING, crio)


def test_the_network_behind_multus_is_what_counts() -> None:
    where = installed(listing(MULTUS, FLANNEL))
    assert texts(where, Level.PROBLEM) == ""
    assert "10-flannel.conflist: our plugin is not in the chain" in texts(listing(MULTUS, FLANNEL), Level.PROBLEM)


def test_an_empty_directory_and_an_entry_in_the_wrong_place() -> None:
    assert "has no configuration" in texts(Listing(), Level.PROBLEM)
    for types, fault in ((["trireme", "bridge"], "is the first"), (["bridge", "trireme", "trireme"], "2 times")):
        network = {"name": "a", "cniVersion": "1.0.0", "plugins": [{"type": kind} for kind in types]}
        assert fault in texts(Listing({"a.conflist": json.dumps(network).encode()}), Level.PROBLEM)


def test_runtimes_settings_are_read_and_what_our_rules_do_not_reach_is_named() -> None:
    where = installed(listing(CALICO))
    second = decode_containerd("config.toml", CONTAINERD_2)
    assert "runtime sandboxed are not enforced: gVisor" in texts(where, Level.WARNING, second)
    assert "runtime odd reads /etc/cni/odd.d" in texts(where, Level.PROBLEM, second)
    third = decode_containerd("config.toml", CONTAINERD_3)
    assert third.bin_dirs == ("/opt/cni/bin", "/usr/lib/cni")
    assert "runtime kata are not enforced: Kata" in texts(where, Level.WARNING, third)
    assert texts(where, Level.PROBLEM, third) == ""


def test_other_directories_than_the_runtimes_are_a_problem() -> None:
    elsewhere = RuntimeSettings(Runtime.CONTAINERD, "test", "/var/net.d", ("/var/bin",), max_conf_num=2)
    problems = texts(installed(listing(CALICO)), Level.PROBLEM, elsewhere)
    assert "reads /var/net.d" in problems
    assert "looks for plugins in /var/bin" in problems
    assert "max_conf_num 2" in texts(installed(listing(CALICO)), Level.WARNING, elsewhere)


def test_cri_os_files_lie_over_one_another() -> None:
    main_file = b'[crio.network]\nnetwork_dir = "/etc/cni/net.d/"\nplugin_dirs = ["/opt/cni/bin/"]\n'
    over = b'[crio.network]\ncni_default_network = "other"\n'
    over += b'[crio.runtime.runtimes.k]\nruntime_path = "/usr/bin/kata-runtime"\n'
    crio = merged([decode_crio("crio.conf", main_file), decode_crio("10.conf", over)])
    assert (crio.conf_dir, crio.bin_dirs, crio.source) == ("/etc/cni/net.d/", ("/opt/cni/bin/",), "crio.conf, 10.conf")
    warnings = texts(installed(listing(CALICO)), Level.WARNING, crio)
    assert "'other' (cni_default_network)" in texts(installed(listing(CALICO)), Level.OK, crio)
    assert "does not configure the network 'other'" in texts(installed(listing(CALICO)), Level.PROBLEM, crio)
    assert "runtime k are not enforced: Kata" in warnings


def test_settings_that_are_no_toml_are_named() -> None:
    with pytest.raises(InstallError, match=r"config\.toml: not TOML"):
        decode_containerd("config.toml", b"= 1")


def test_a_real_node_is_examined(tmp_path: Path) -> None:
    conf_dir, bin_dir, run_dir = tmp_path / "net.d", tmp_path / "bin", tmp_path / "run"
    for directory in (conf_dir, bin_dir, run_dir, tmp_path / "crio" / "crio.conf.d"):
        directory.mkdir(parents=True)
    (conf_dir / FLANNEL).write_bytes((VECTORS / FLANNEL).read_bytes())
    (tmp_path / "config.toml").write_text("broken")
    (tmp_path / "crio" / "crio.conf.d" / "10.conf").write_text('[crio.network]\nnetwork_dir = "/x"\n')
    places = ["--conf-dir", str(conf_dir), "--bin-dir", str(bin_dir)]
    before = examine(conf_dir, bin_dir, run_dir, (tmp_path / "config.toml", tmp_path / "crio"))
    assert before.program_fault is not None
    assert before.daemon_fault is not None
    assert [settings.conf_dir for settings in before.runtimes] == ["/x"]
    assert "not TOML" in before.runtime_faults[0]
    assert CliRunner().invoke(main, [*places, "doctor", "--run-dir", str(run_dir)]).exit_code == 1
    assert CliRunner().invoke(main, [*places, "install"]).exit_code == 0
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(run_dir / "registration.sock"))
        daemon.listen()
        after = examine(conf_dir, bin_dir, run_dir, ())
    assert (after.program_fault, after.daemon_fault, after.runtimes) == (None, None, ())


def test_directories_are_the_runtimes_also_by_another_name(tmp_path: Path) -> None:
    """A snap's settings name its revision, to which `current` is a link."""
    revision, current = tmp_path / "7180", tmp_path / "current"
    (revision / "cni-network").mkdir(parents=True)
    current.symlink_to(revision)
    (revision / "containerd.toml").write_text(
        f'[plugins.cri.cni]\nconf_dir = "{revision}/cni-network"\nbin_dir = "{revision}/bin"\n'
        f'[plugins.cri.containerd.runtimes.own]\ncni_conf_dir = "{revision}/cni-network"\n'
    )
    facts = examine(current / "cni-network", current / "bin", tmp_path, (current / "containerd.toml",))
    problems = "\n".join(finding.text for finding in diagnose(facts) if finding.level is Level.PROBLEM)
    assert "reads" not in problems
    assert "looks for plugins" not in problems
    other = examine(tmp_path, tmp_path, tmp_path, (current / "containerd.toml",))
    assert f"containerd reads {revision}/cni-network" in "\n".join(finding.text for finding in diagnose(other))


def test_what_containerds_file_imports_lies_over_it(tmp_path: Path) -> None:
    """By name or pattern, relative or absolute, imports of imports too, each once; what is missing is named."""

    def section(line: str) -> str:
        return f'[plugins."io.containerd.grpc.v1.cri".cni]\n{line}\n'

    (tmp_path / "conf.d").mkdir()
    (tmp_path / "config.toml").write_text(
        f'version = 2\nimports = ["conf.d/*.toml", "{tmp_path}/gone.toml"]\n' + section('conf_dir = "/first"')
    )
    (tmp_path / "conf.d" / "10.toml").write_text('imports = ["../config.toml", "../last.toml"]\n')
    (tmp_path / "conf.d" / "20.toml").write_text(section('conf_dir = "/second"'))
    (tmp_path / "conf.d" / "30.conf").write_text(section('conf_dir = "/no-match"'))
    (tmp_path / "last.toml").write_text(section('bin_dir = "/last"'))
    facts = examine(tmp_path, tmp_path, tmp_path, (tmp_path / "config.toml",))
    [settings] = facts.runtimes
    assert (settings.conf_dir, settings.bin_dirs) == ("/second", ("/last",))
    names = ("config.toml", "conf.d/10.toml", "conf.d/20.toml", "last.toml")
    assert settings.source == ", ".join(str(tmp_path / name) for name in names)
    assert facts.runtime_faults == (f"{tmp_path}/gone.toml: cannot be read: No such file or directory",)


def test_a_k3s_before_its_fixed_plugin_directory_is_installed_by_its_link(tmp_path: Path) -> None:
    """Its settings name the directory of the release; `current` is a link there, made anew with each release."""
    release, current = tmp_path / "data" / "3f9c0a", tmp_path / "data" / "current"
    (release / "bin").mkdir(parents=True)
    current.symlink_to(release)
    (tmp_path / "config.toml").write_text(
        f'version = 2\n[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "{release}/bin"\n'
    )
    facts = examine(tmp_path, current / "bin", tmp_path, (tmp_path / "config.toml",))
    assert "looks for plugins" not in "\n".join(finding.text for finding in diagnose(facts))


def test_without_a_named_distribution_the_runtime_is_looked_for_in_all_places() -> None:
    for name, layout in LAYOUTS.items():
        assert set(layout.runtime_configs) <= set(runtime_configs("default"))
        assert name == "default" or runtime_configs(name) == layout.runtime_configs


def test_a_k3s_node_taken_for_a_default_one_is_told_its_directories() -> None:
    k3s = LAYOUTS["k3s"]
    text = f'version = 3\n[plugins."io.containerd.cri.v1.runtime".cni]\nbin_dirs = ["{k3s.bin_dir}"]\n'
    text += f'conf_dir = "{k3s.conf_dir}"\n'
    problems = texts(installed(listing(FLANNEL)), Level.PROBLEM, decode_containerd("config.toml", text.encode()))
    assert f"containerd reads {k3s.conf_dir} (config.toml), not /etc/cni/net.d: give --conf-dir" in problems
    assert f"looks for plugins in {k3s.bin_dir}" in problems
