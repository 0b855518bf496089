"""What others call their things does nothing to a terminal, a pipe, a log or a program that reads JSON."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockdev.printable import printable
from runvol import doctor_shown, logs, schemas, tables
from runvol.diagnosis import warning

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b]0;owned\x07\x9b31m\r\u202eb\nError: c\udcff"
PLAIN = "a\\u001b]0;owned\\u0007\\u009b31m\\r\\u202eb\\nError: c\\udcff"


def put(state: Path, seen_at: str) -> None:
    """A container of a pod, as containerd describes it."""
    bundle = state / "containerd/io.containerd.runtime.v2.task/k8s.io/c1"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps({
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "c",
                        "io.kubernetes.cri.sandbox-namespace": "n", "io.kubernetes.cri.sandbox-name": "p",
                        "io.kubernetes.cri.sandbox-uid": "u1"},
        "mounts": [{"destination": seen_at, "source": "/var/lib/kubelet/pods/u1/volumes/x/y/mount", "type": "bind"}],
    }))  # fmt: skip


def where(tmp_path: Path, *words: str, terminal: bool = False) -> str:
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'[paths]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\npod_logs = "{tmp_path}/logs"\n'
        f'containerd_config = "/no"\n[cri]\nendpoint = "unix://{tmp_path}/containerd/containerd.sock"\n'
    )
    command = [sys.executable, "-m", "runvol", "--config", str(settings), "where", "n/p", *words]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    ours, theirs = pty.openpty()
    subprocess.run(command, cwd=ROOT, check=True, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 1 << 16)
        except OSError:
            os.close(ours)
            return said.decode().replace("\r\n", "\n")


def test_a_mount_path_of_a_pod_is_one_line_without_escapes(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    put(tmp_path, "/data\x1b[2J\x9b\u202e\nvolume  c  /etc")
    for said in (where(tmp_path), where(tmp_path, terminal=True)):
        assert all(one.isprintable() or one == "\n" for one in said)
        assert "/data\\u001b[2J\\u009b\\u202e volume" in " ".join(said.split())
    (item,) = [one for one in json.loads(where(tmp_path, "--json"))["items"] if one["what"] == "volume"]
    assert item["seenAt"] == "/data\x1b[2J\x9b\u202e\nvolume  c  /etc"


def test_a_line_for_a_person_has_escapes_for_what_is_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(HOSTILE) == PLAIN
    assert printable("Größe 10 €\n", lines=True) == "Größe 10 €\n"
    assert tables.text(HOSTILE) == PLAIN.replace("\\n", " ")
    assert tables.text([HOSTILE]) == PLAIN.replace("\\n", " ")
    tables.warn(HOSTILE)
    tables.tell([schemas.Outcome(action="made", what="image", name="n", done=True, message=HOSTILE)], as_json=False)
    doctor_shown.show([warning("volumes.problem", f"volume {HOSTILE}", HOSTILE)], as_json=False)
    said = capsys.readouterr()
    assert said.err == f"warning: {PLAIN}\n".replace("\\n", "\n", 1)
    assert all(one.isprintable() or one == "\n" for one in said.out)
    assert f"{'':9}volume {PLAIN}: {PLAIN}".replace("\\n", " ") in said.out, "a finding is one line in a pipe"


def test_json_of_names_that_are_no_text_is_json() -> None:
    item = schemas.Outcome(action="made", what="image", name="\udcff", done=True, message="x\udcff")
    (read,) = json.loads(schemas.written(schemas.Outcome, [item]))["items"]
    assert (read["name"], read["message"]) == ("\\udcff", "x\\udcff")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_event_of_the_log_is_one_line(form: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs._Lines(as_json=form == "json"))
    log = logging.Logger("runvol.x")
    log.addHandler(handler)
    log.warning("of %s", HOSTILE, extra={"pod": HOSTILE, "event": "another", "time": "1970", "level": "debug"})
    line: str = stream.getvalue()
    assert line.count("\n") == 1 and line.endswith("\n") and line[:-1].isprintable()
    if form == "json":
        said: dict[str, Any] = json.loads(line)
        assert said["pod"] == HOSTILE and said["level"] == "warning" and said["event"] == f"of {HOSTILE}"
        assert said["time"] != "1970"
    else:
        assert f"of {PLAIN} pod=" in line


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
@pytest.mark.parametrize("words", ["--help", "--version", "parameters", "parameters --json", "volumes delete nothing"])
def test_whatever_stands_in_the_place_of_the_streams_there_is_a_status_and_no_traceback(
    words: str, streams: str, tmp_path: Path
) -> None:
    command = f'"{sys.executable}" -m runvol --state-dir {tmp_path}/s --run-dir {tmp_path}/r {words} {streams}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    unsaid = {">/dev/full": "no space left on device", ">&-": "bad file descriptor", "<&- >&- 2>&-": ""}.get(streams)
    assert done.returncode == (1 if unsaid is not None or words.startswith("volumes") else 0), done.stderr
    if unsaid and not words.startswith("volumes"):
        assert done.stderr == f"Error: {unsaid}\n"


def test_what_is_opened_is_never_in_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """A file of ours as descriptor 1 would have all that is said written into it."""
    code = (
        "from runvol import cli, entry\n"
        "cli.main = lambda: None\nentry.main()\n"
        f"fd = open({str(tmp_path / 'store')!r}, 'w').fileno()\nopen({str(tmp_path / 'said')!r}, 'w').write(str(fd))\n"
    )
    subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"$0\" <&- >&- 2>&-", code], cwd=ROOT, check=True)
    assert int((tmp_path / "said").read_text()) > 2


def test_a_name_is_told_in_whatever_encoding_there_is(tmp_path: Path) -> None:
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(
            [sys.executable, "-m", "runvol", "--state-dir", tmp_path, "where", b"\xff\xc3\xa9\xe2\x82\xac"], cwd=ROOT,
            env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.startswith("Error: nothing of a pod \\udcff"), done.stderr
