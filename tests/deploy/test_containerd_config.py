"""`runvol snapshotter containerd-config`: containerd itself says that all that was in force is, and the snapshotter too."""

from __future__ import annotations

import os
import stat
import tomllib
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf import empty_pb2, wrappers_pb2

from guestmount.containerd_files import CRI, IMAGES, RUNTIME
from runvol.cli import main
from runvol.containerd_wish import TRANSFER, machine
from tests.deploy.containerds import VERSIONS, dumped, leaves

# What a node has, and must keep.
NODE = """# Kept by hand.
version = 2
root = "/data/containerd"   # the big disk
oom_score = -999
required_plugins = ["io.containerd.grpc.v1.cri"]

[grpc]
  max_recv_message_size = 33554432

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.local/pause:3.9"
    # Not what containerd has by itself.
    max_concurrent_downloads = 7
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/libexec/cni"
      conf_dir = "/etc/cni/other.d"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
          SystemdCgroup = true
      [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes."kata.qemu"]
        runtime_type = "io.containerd.kata.v2"
        pod_annotations = [
          "io.katacontainers.*",   # [this.is.no.table]
        ]
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes."kata.qemu".options]
          ConfigPath = "/opt/kata/share/defaults/kata-containers/configuration-qemu.toml"
    [plugins."io.containerd.grpc.v1.cri".registry]
      config_path = "/etc/containerd/certs.d"

[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "1s"

[proxy_plugins."stargz.v1"]
  type = "snapshot"
  address = "/run/stargz.sock"

[timeouts]
  "io.containerd.timeout.shim.load" = "9s"
"""
CONTAINERD = f'[plugins."{CRI}".containerd]'
KATA = f"[plugins.'{CRI}'.containerd.runtimes.\"kata.qemu\"]"
NODE_3 = f"""version = 3
[plugins."{IMAGES}"]
snapshotter = "overlayfs"
[plugins."{IMAGES}".pinned_images]
sandbox = "registry.local/pause:3.9"
[plugins."{IMAGES}".registry]
config_path = "/etc/containerd/certs.d"
[plugins."{RUNTIME}".cni]
bin_dirs = ["/usr/libexec/cni"]
[plugins."{RUNTIME}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
options.SystemdCgroup = true
[plugins."{RUNTIME}".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
"""
OURS = ("proxy_plugins", "runvol")


def command(file: Path, version: str, *more: str) -> Result:
    words = ["snapshotter", "containerd-config", "--containerd-version", version, "--config", str(file), *more]
    if version.startswith("v1.6"):
        words.append("--all-runtimes")
    return CliRunner().invoke(main, words, catch_exceptions=False)


def printed(file: Path, version: str, *more: str) -> str:
    done = command(file, version, *more)
    assert done.exit_code == 0, done.output
    return done.stdout_bytes.decode()


def is_ours(path: tuple[str, ...], value: Any) -> bool:
    """What the command may have changed."""
    return (
        path[:2] == OURS
        or ("runtime_platforms" in path and path[-1] in ("snapshotter", "platform"))
        or (path[-1] == "snapshotter" and value == "runvol")
        or (path[-1] == "runtime_type" and value == "io.containerd.kata.v2")
        or path[-1] == "unpack_config"
    )


def compare(version: str, before: dict[str, Any], after: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """All values of the first are those of the second; what is new is the snapshotter's."""
    was, now = dict(leaves(before)), dict(leaves(after))
    # Of a runtime that is in no file 1.7 prints each option that it might have, and how it runs the sandbox.
    was = {path: value for path, value in was.items()
           if path in now or not ("options" in path and not value)}  # fmt: skip
    allowed = {path for path, value in now.items() if is_ours(path, value) or path[0] in without}
    # A new runtime's own table comes with what containerd has for every one.
    allowed |= {path for path, value in now.items() if path not in was and (not value or "kata" in path)}
    allowed |= {path for path, value in now.items() if path[-1] == "sandbox_mode" and not value}
    assert {
        path: (was.get(path), now[path]) for path in now if was.get(path) != now[path] and path not in allowed
    } == {}
    assert [path for path in was if path not in now and path[0] not in without] == []
    assert after["proxy_plugins"]["runvol"]["address"] == "/run/runvol/snapshotter.sock"
    for one in was.get(("plugins", TRANSFER, "unpack_config"), []):
        assert one in now["plugins", TRANSFER, "unpack_config"]


def users(after: dict[str, Any]) -> set[str]:
    return {path[-2] for path, value in leaves(after) if path[-1] == "snapshotter" and value == "runvol"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["", "crlf"])
def test_what_the_node_had_stays_in_force(version: str, line_end: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(NODE.replace("\n", line_end).encode())
    before = dumped(version, file)
    assert "registry.local/pause:3.9" in str(before)
    file.write_bytes(printed(file, version).encode())
    compare(version, before, dumped(version, file))
    assert users(dumped(version, file)) >= ({"containerd"} if version == "v1.6.20" else {"kata.qemu"})
    # As text: each line is still there, comments too, and the command has nothing more to say.
    lines = file.read_bytes().decode().split(line_end)
    assert [line for line in NODE.split("\n") if line not in lines] == []
    assert printed(file, version) == file.read_bytes().decode()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_imported_stays_in_force(version: str, tmp_path: Path) -> None:
    """1.x would replace the whole CRI section by the last one; 2.x merges them."""
    file, more = tmp_path / "config.toml", tmp_path / "conf.d"
    more.mkdir()
    file.write_text(f'imports = ["{more}/*.toml", "last.toml"]\n{NODE}')
    (more / "a.toml").write_text(
        f'version = 2\nimports = ["../deep.toml"]\n[plugins."{CRI}"]\nsandbox_image = "other/pause:1"\n'
        f'[plugins."{CRI}".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    (more / ".hidden.toml").write_text('version = 2\n[proxy_plugins.hidden]\ntype = "content"\naddress = "/h"\n')
    (tmp_path / "last.toml").write_text(
        f'version = 2\n[plugins."{CRI}".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
        f'privileged_without_host_devices = true\n[plugins."{CRI}".registry]\nconfig_path = "/last"\n'
    )
    (tmp_path / "deep.toml").write_text('version = 2\n[proxy_plugins.deep]\ntype = "content"\naddress = "/d"\n')
    before = dumped(version, file)
    assert {"hidden", "deep"} <= before["proxy_plugins"].keys()
    done = command(file, version)
    assert done.exit_code == 0, done.output
    file.write_text(done.stdout)
    after = dumped(version, file)
    compare(version, before, after, without=("imports",))
    assert users(after) >= ({"containerd"} if version == "v1.6.20" else {"kata"})
    # What was merged says so; what could stay as it was does.
    assert ("not kept: the comments, and `imports`" in done.stderr) == version.startswith("v1")
    assert printed(file, version) == done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_the_first_form(version: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[plugins.cri]\nsandbox_image = "registry.local/pause:3.9"\n[plugins.cri.cni]\nbin_dir = "/usr/libexec/cni"\n'
        "[plugins.cri.containerd.runtimes.runc]\n"
        'runtime_type = "io.containerd.runc.v2"\n[plugins.cri.containerd.runtimes.runc.options]\nSystemdCgroup = true\n'
        '[plugins.cri.containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    before = dumped(version, file)
    file.write_text(printed(file, version))
    after = dumped(version, file)
    compare(version, before, after)
    assert users(after) >= ({"containerd"} if version == "v1.6.20" else {"kata"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("content", [None, "", "# nothing\n"], ids=["missing", "empty", "comment"])
def test_without_a_file_containerd_keeps_what_it_has_by_itself(version: str, content: str | None, tmp_path: Path):
    file = tmp_path / "config.toml"
    if content is not None:
        file.write_text(content)
    more = () if version == "v1.6.20" else ("--runtime", "kata=io.containerd.kata.v2")
    done = command(file, version, "--write", *more)
    assert done.exit_code == 0, done.output
    compare(version, dumped(version, None), dumped(version, file), without=("imports",))
    assert list(tmp_path.glob("*.before-runvol")) == (
        [] if content is None else [tmp_path / "config.toml.before-runvol"]
    )


@pytest.mark.parametrize(
    "text", [NODE_3, NODE_3.replace("options.Sys", "options . Sys").replace("version = 3", "version = 4")]
)
def test_the_forms_of_containerd_2(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    before = dumped("v2.4.2", file)
    file.write_text(printed(file, "2.4.2"))
    after = dumped("v2.4.2", file)
    compare("v2.4.2", before, after)
    assert after["plugins"][RUNTIME]["containerd"]["runtimes"]["kata"]["snapshotter"] == "runvol"
    assert after["plugins"][IMAGES]["runtime_platforms"]["kata"]["snapshotter"] == "runvol"
    unpack = after["plugins"][TRANSFER]["unpack_config"]
    assert [(one["platform"], one["snapshotter"]) for one in unpack] == [
        (machine(), "runvol"), (machine(), "overlayfs"), (machine().replace("linux", "linux(+erofs)"), "erofs"),
    ]  # fmt: skip


def test_a_list_of_the_operators_is_not_made_longer_than_by_one(tmp_path: Path) -> None:
    theirs = {"platform": "linux", "snapshotter": "native", "differ": "walking"}
    file = tmp_path / "config.toml"
    file.write_text(f'{NODE_3}[plugins."{TRANSFER}"]\nunpack_config = '
                    '[{ platform = "linux", snapshotter = "native", differ = "walking" }]\n')  # fmt: skip
    done = command(file, "2.4.2")
    assert "not kept: the comments" in done.stderr
    found = tomllib.loads(done.stdout)["plugins"][TRANSFER]["unpack_config"]
    assert found == [theirs, {"platform": machine(), "snapshotter": "runvol"}]


def test_an_entry_of_runvol_is_put_right(tmp_path: Path) -> None:
    """Of another address, or another machine: what an earlier release's file had for every one."""
    file = tmp_path / "config.toml"
    file.write_text(
        f'{NODE_3}\n[proxy_plugins.runvol]\ntype = "snapshot"\naddress = "/run/old.sock"  # by hand\nexports.root = "/r"\n'
        f'[plugins."{IMAGES}".runtime_platforms.kata]\nplatform = "linux/s390x"\nsnapshotter = "runvol"\n'
        f'[[plugins."{TRANSFER}".unpack_config]]\nplatform = "linux/s390x"\nsnapshotter = "runvol"\n'
        f'[[plugins."{TRANSFER}".unpack_config]]\nplatform = "linux/s390x"\nsnapshotter = "overlayfs"\n'
    )
    found = tomllib.loads(printed(file, "2.4.2", "--platform", "linux/arm64"))
    assert found["proxy_plugins"]["runvol"] == {
        "type": "snapshot", "address": "/run/runvol/snapshotter.sock", "exports": {"root": "/r"},
    }  # fmt: skip
    assert found["plugins"][IMAGES]["runtime_platforms"]["kata"]["platform"] == "linux/arm64"
    assert found["plugins"][TRANSFER]["unpack_config"][0] == {"platform": "linux/arm64", "snapshotter": "runvol"}


OTHER = f'[plugins."{CRI}".containerd.runtimes.runc]\n'
CONTRADICTIONS = {
    "discarding": (
        "1.7",
        NODE.replace(CONTAINERD, f"{CONTAINERD}\ndiscard_unpacked_layers = true"),
        (),
        "set it to false",
    ),
    "another snapshotter": ("1.7", NODE.replace(KATA, f'{KATA}\nsnapshotter = "nydus"'), (), "'nydus'"),
    "another plugin": ("2.0", f'{NODE}\n[proxy_plugins.runvol]\ntype = "diff"\n', (), "another plugin's"),
    "no CRI": ("2.0", 'disabled_plugins = ["cri"]\n', ("--runtime", "kata"), "disabled_plugins has 'cri'"),
    "no such runtime": ("1.7", NODE, ("--runtime", "rund"), "no runtime 'rund'"),
    "another type": ("1.7", NODE, ("--runtime", "runc=io.containerd.kata.v2"), "'io.containerd.runc.v2', not"),
    "no sandbox": ("1.7", "version = 2\n", (), "no runtime that is a sandbox"),
    "too new a form": ("1.7", NODE_3, (), "version = 3 is not read by containerd 1.7"),
    "form 4 in 2.2": ("2.2", NODE_3.replace("= 3", "= 4"), (), "up to 3"),
    "no TOML": ("1.7", "x = [\n", (), "is no TOML"),
    "no such import": ("1.7", f'imports = ["x.toml"]\n{NODE}', (), "x.toml, which does not exist"),
    "a pattern from nowhere": ("1.7", f'imports = ["x*"]\n{NODE}', (), "write it from the root on"),
    "no table": (
        "1.7",
        f'version = 2\n[plugins."{CRI}".containerd.runtimes]\nkata = 3\n',
        (),
        "runtimes.kata = 3 is no",
    ),
    "no list": (
        "2.0",
        f'{NODE_3}[plugins."{TRANSFER}"]\nunpack_config = 3\n',
        (),
        "unpack_config is no list of tables",
    ),
    "no such version": ("1.5", NODE, (), "containerd 1.5 is not known"),
    "no version": ("new", NODE, (), "is no version of containerd"),
    "all and one": ("1.7", NODE, ("--all-runtimes", "--runtime", "kata.qemu"), "--all-runtimes names all of them"),
    "two types": ("1.7", NODE, ("--runtime", "a=b", "--runtime", "a=c"), "is given twice"),
    "no type": ("1.7", NODE, ("--runtime", "a="), "takes HANDLER, or HANDLER=TYPE"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    version, text, more, said = CONTRADICTIONS[name]
    file = tmp_path / "config.toml"
    file.write_text(text)
    for _ in range(2):
        done = command(file, version, "--write", *more)
        assert done.exit_code == 1
        assert said in done.output
    assert file.read_text() == text
    assert os.listdir(tmp_path) == ["config.toml"]


@pytest.mark.parametrize("text", [NODE, NODE.replace(CONTAINERD, f'{CONTAINERD}\nsnapshotter = "overlayfs"'), NODE_3])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_becomes_the_default_of_all(version: str, text: str, tmp_path: Path) -> None:
    if text is NODE_3 and version != VERSIONS[-1]:
        return  # a form that only the newer ones read
    file = tmp_path / "config.toml"
    file.write_text(text)
    before, more = dumped(version, file), () if version.startswith("v1.6") else ("--all-runtimes",)
    file.write_text(printed(file, version, *more))
    after = dumped(version, file)
    compare(version, before, after)
    plugins = after["plugins"]
    table = plugins[IMAGES] if version == VERSIONS[-1] else plugins[CRI]["containerd"]
    assert table["snapshotter"] == "runvol"
    assert after["proxy_plugins"]["runvol"].get("exports", {}).get("root") in (
        (None,) if version == "v1.6.20" else ("/var/lib/runvol/snapshotter/gauge",)
    )
    assert printed(file, version, *more) == file.read_text()


def test_what_kubelet_is_told_follows_the_gauge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text(NODE_3)
    told = []
    # As it was once, by default, without a gauge, an operator's own.
    for place in ("/var/lib/runvol", "/var/lib/runvol/snapshotter/gauge", "", "/mine"):
        if place == "/var/lib/runvol":
            file.write_text(printed(file, "2.4").replace("/var/lib/runvol/snapshotter/gauge", place))
        elif place == "/mine":
            file.write_text(file.read_text().replace('root = "/var/lib/runvol"', 'root = "/mine"'))
        else:
            monkeypatch.setenv("RUNVOL_SNAPSHOTTER_GAUGE", place and "auto")
        file.write_text(printed(file, "2.4"))
        told.append(tomllib.loads(file.read_text())["proxy_plugins"]["runvol"]["exports"]["root"])
    gauge = "/var/lib/runvol/snapshotter/gauge"
    assert told == [gauge, gauge, "/var/lib/runvol", "/mine"]


def test_one_snapshotter_for_all_has_to_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(NODE)
    words = ["snapshotter", "containerd-config", "--containerd-version", "1.6.20", "--config", str(file)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "say --all-runtimes" in done.output
    file.write_text(NODE.replace(CONTAINERD, f'{CONTAINERD}\nsnapshotter = "stargz"'))
    assert "'stargz'" in command(file, "v1.6.20").output


def test_what_an_import_says_wins_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'imports = ["b.toml"]\n{NODE_3}')
    (tmp_path / "b.toml").write_text('version = 3\n[proxy_plugins.runvol]\ntype = "snapshot"\naddress = "/other"\n')
    done = command(file, "2.4.2")
    assert done.exit_code == 1
    assert f"{tmp_path}/b.toml, which is imported, has another proxy_plugins.runvol.address and wins" in done.output


def test_the_file_is_replaced_whole_and_a_copy_is_kept(tmp_path: Path) -> None:
    real, file = tmp_path / "real.toml", tmp_path / "config.toml"
    real.write_text(NODE)
    real.chmod(0o640)
    os.chown(real, 12, 13)
    file.symlink_to("real.toml")
    done = command(file, "1.7", "--write")
    assert done.exit_code == 0, done.output
    assert file.is_symlink()
    found = os.stat(real)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 12, 13)
    copy = tmp_path / "real.toml.before-runvol"
    assert copy.read_text() == NODE
    assert f"the old one is {copy}" in done.stderr
    assert "nothing was changed" in command(file, "1.7", "--write").output
    # Another old file does not take the first one's place.
    real.write_text(f"# again\n{NODE}")
    assert command(file, "1.7", "--write").exit_code == 0
    assert copy.read_text() == NODE
    assert (tmp_path / "real.toml.before-runvol.1").read_text() == f"# again\n{NODE}"
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "real.toml", copy.name, f"{copy.name}.1"]


def test_a_copy_is_never_imported(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'imports = ["{tmp_path}/conf*"]\n{NODE}')
    done = command(file, "1.7", "--write")
    assert done.exit_code == 1
    assert "which the copy of the old one would have" in done.output
    assert os.listdir(tmp_path) == ["config.toml"]


def test_a_file_that_is_made_anew_at_each_start_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "var/lib/rancher/k3s/agent/etc/containerd/config.toml"
    file.parent.mkdir(parents=True)
    generated = f"# File generated by k3s. DO NOT EDIT. Use config-v3.toml.tmpl instead.\n{NODE_3}"
    file.write_text(generated)
    words = ["snapshotter", "containerd-config", "--containerd-version", "2.4", "--root", str(tmp_path)]
    done = CliRunner().invoke(main, [*words, "--runtime", "rund=io.containerd.rund.v2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    # All of it is new tables: k3s's own part stays k3s's.
    assert done.stdout.startswith('{{ template "base" . }}\n')
    assert "SystemdCgroup" not in done.stdout
    assert "/agent/etc/containerd/config-v3.toml.tmpl: this is what it has to be; then restart k3s" in done.stderr
    tomllib.loads(generated + done.stdout.split("\n", 1)[1])
    # Into tables that k3s makes nothing can be put but by a whole template.
    whole = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "SystemdCgroup" in whole.stdout
    tomllib.loads(whole.stdout)
    (file.parent / "config-v3.toml.tmpl").write_text("{{ template }}")
    assert "set there: " in CliRunner().invoke(main, words).output
    refused = CliRunner().invoke(main, [*words, "--write"])
    assert refused.exit_code == 1
    assert "is made anew by k3s at each start" in refused.output
    assert file.read_text() == generated


def serve(path: Path, version: str) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    method = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: wrappers_pb2.StringValue(value=version),
        request_deserializer=empty_pb2.Empty.FromString,
        response_serializer=wrappers_pb2.StringValue.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("containerd.services.version.v1.Version", {"Version": method}),)
    )
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server


@pytest.mark.parametrize("version", ["v1.7.33", "2.4.2-k3s1", "1.6.20~ds1"])
def test_the_running_containerd_is_asked_for_its_version(version: str, tmp_path: Path, monkeypatch) -> None:
    file, path = tmp_path / "config.toml", tmp_path / "c.sock"
    file.write_text(NODE)
    monkeypatch.setenv("RUNVOL_CRI_ENDPOINT", f"unix://{path}")
    words = ["snapshotter", "containerd-config", "--detect", "--config", str(file)]
    server = serve(path, version)
    done = CliRunner().invoke(main, words)
    server.stop(None).wait()
    if version.startswith("1.6"):
        assert "containerd 1.6 has one snapshotter" in done.output
    else:
        assert f"for containerd {version.lstrip('v')[:3]}: " in done.stderr
    monkeypatch.setenv("RUNVOL_CRI_ENDPOINT", f"unix://{tmp_path}/none.sock")
    assert "say --containerd-version" in CliRunner().invoke(main, [*words, "--root", str(tmp_path)]).output
    assert "give one of them" in CliRunner().invoke(main, [*words, "--containerd-version", "1.7"]).output
