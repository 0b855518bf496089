"""A controller that remembers nothing asks the cluster where volumes lie whose ids do not say it, and for its lists."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from guestmount import KubernetesApi, cluster_exports
from runvol.config import ConfigError, load
from tests.volumes.test_nfs_backend import make, record, share  # noqa: F401
from volumes import StoreFailed, export_ids, exports
from volumes.errors import ExportUnknown
from volumes.exports import Said
from volumes.nfs import NfsBackend

CLASS = Said(parameters={"server": "nas", "share": "/e"}, mount_options=("port=2050", "nfsvers=4.1"))


class Cluster:
    """Says what it is told to, or does not answer."""

    def __init__(self, *said: Said) -> None:
        self.said, self.asked, self.down = said, 0, False

    def __call__(self):
        self.asked += 1
        if self.down:
            raise StoreFailed("the API does not answer")
        return self.said


@pytest.fixture
def fresh(tmp_path: Path):
    numbers = itertools.count()

    def made(cluster=None, **more) -> NfsBackend:
        state = tmp_path / f"state-{next(numbers)}"
        state.mkdir()
        return NfsBackend(str(state), cluster=cluster, **more)

    return made


def older(share, volume) -> str:  # noqa: F811
    """The id as an earlier release gave it."""
    facts = json.loads(record(share, volume).read_text())
    del facts["handle"]
    record(share, volume).write_text(json.dumps(facts))
    return export_ids.short(volume.volume_id)


def test_a_persistent_volume_says_where_its_volume_lies(fresh, share):  # noqa: F811
    volume = make(fresh(), subDir="a/b/c")
    old = older(share, volume)
    said = Said(handle=old, parameters={"server": "nas", "path": "/e/a/b/c"})
    cluster = Cluster(Said(handle=old, parameters={"server": "other", "path": "/e/a/b/c"}), said)
    assert fresh(cluster).get(old).volume_id == old
    assert cluster.asked == 1
    fresh(cluster).delete(old)
    assert fresh(exports_known=["nas:/e"]).get(old) is None


def test_an_id_that_says_its_export_needs_no_cluster(fresh, share):  # noqa: F811
    volume = make(fresh())
    cluster = Cluster()
    cluster.down = True
    controller = fresh(cluster)
    assert controller.get(volume.volume_id) == volume
    controller.delete(volume.volume_id)


def test_a_cluster_that_does_not_answer_is_said_and_nothing_is_gone(fresh, share):  # noqa: F811
    volume = make(fresh())
    old = older(share, volume)
    cluster = Cluster(CLASS)
    cluster.down = True
    controller = fresh(cluster)
    for call in (controller.delete, controller.get):
        with pytest.raises(ExportUnknown, match="the API does not answer"):
            call(old)
    assert cluster.asked == 1, "each call waited for it anew"
    told: list[str] = []
    assert controller.list(trouble=told.append) == []
    assert told == ["the API does not answer"]
    # The setting is as good, and needs no API.
    assert fresh(cluster, exports_known=["nas:/e"]).get(old).volume_id == old


def test_the_options_of_a_class_are_those_of_the_mounts(fresh, share, monkeypatch):  # noqa: F811
    """Without the port, the server is not there."""
    volume = make(fresh())
    before, seen = exports.opened, []

    def opened(export):
        seen.append((export.port, export.version))
        return before(export)

    monkeypatch.setattr(exports, "opened", opened)
    listed = fresh(Cluster(CLASS)).list()
    assert [one.volume_id for _place, one in listed] == [volume.volume_id]
    assert fresh(Cluster(CLASS)).get(volume.volume_id) == volume
    assert {*seen} == {(2050, "4.1")}


def test_lists_have_what_classes_and_volumes_name_each_share_once(fresh, share):  # noqa: F811
    volumes = [make(fresh(), f"v{number}") for number in range(3)]
    said = [Said(handle=one.volume_id, parameters={"server": "nas", "path": f"/e/{one.name}"}) for one in volumes]
    # A class whose server is no server, one that is nobody's export, one that is away, and one volume of somebody else.
    bad = [
        Said(parameters={"server": "-;rm", "path": "/e"}),
        Said(parameters={"backend": "loop"}),
        Said(parameters={"server": "away", "path": "/e"}),
        Said(handle="somebody-elses", parameters={"server": "nas", "path": "/e/x"}),
    ]
    told: list[str] = []
    listed = fresh(Cluster(*bad, CLASS, *said)).list(trouble=told.append)
    assert sorted(one.volume_id for _place, one in listed) == sorted(one.volume_id for one in volumes)
    assert len(told) == 1 and "away:/e" in told[0]


# -- the API


@pytest.fixture
def api():
    """Pages of two objects."""
    classes = [
        {
            "provisioner": "nfs.csi.runvol.io",
            "parameters": {"server": "nas", "path": "/e"},
            "mountOptions": ["port=2050"],
        },
        {"provisioner": "csi.runvol.io", "parameters": {"backend": "loop"}},
        {"provisioner": "somebody.else", "parameters": {"server": "other", "path": "/o"}},
        {"provisioner": "csi.runvol.io"},
    ]
    volumes = [
        {"spec": {"csi": {"driver": "csi.runvol.io", "volumeHandle": f"h{number}", "volumeAttributes": {"server": "nas"}},
                  "mountOptions": ["vers=3"]}}
        for number in range(5)
    ] + [{"spec": {"nfs": {"server": "x"}}}, {"spec": {"csi": {"driver": "else", "volumeHandle": "h9"}}}, {}]  # fmt: skip
    lists = {"/apis/storage.k8s.io/v1/storageclasses": classes, "/api/v1/persistentvolumes": volumes}
    refuse: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = urlsplit(self.path)
            if asked.path in refuse:
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first = int(parse_qs(asked.query).get("continue", ["0"])[0])
            rest = lists[asked.path][first:]
            more = {"continue": str(first + 2)} if len(rest) > 2 else {}
            body = json.dumps({"items": rest[:2], "metadata": more}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = KubernetesApi(server=f"http://127.0.0.1:{server.server_port}", account="/nowhere")
    made.refuse = refuse
    yield made
    server.shutdown()


def test_all_pages_are_read_and_only_ours_taken(api):
    found = cluster_exports.said(api)
    assert found[0] == Said(parameters={"server": "nas", "path": "/e"}, mount_options=("port=2050",))
    assert [one.handle for one in found] == ["", "", "h0", "h1", "h2", "h3", "h4"]
    assert found[-1].mount_options == ("vers=3",)


@pytest.mark.parametrize("path", ["/apis/storage.k8s.io/v1/storageclasses", "/api/v1/persistentvolumes"])
def test_what_may_not_be_listed_is_said(api, path):
    api.refuse.append(path)
    with pytest.raises(StoreFailed, match="403"):
        cluster_exports.said(api)


@pytest.mark.parametrize(
    ("text", "server", "path"),
    [
        ("nas:/e", "nas", "/e"),
        ("[fd00::1]:/e;port=2050", "fd00::1", "/e"),
        ("nas:/a:/b", "nas", "/a:/b"),
        ("nas:/", "nas", "/"),
    ],
)
def test_the_setting_names_an_export(text, server, path):
    found = exports._named(text)
    assert (found.server, found.path) == (server, path)
    assert load(environment={"RUNVOL_NFS_EXPORTS": text}).words("nfs.exports") == (text,)
    # And an id of a volume there says the same.
    said = export_ids.export_of(export_ids.id_of(found, "one", "nfs-"))
    assert said is not None
    assert (said.server, said.path) == (server, path)


@pytest.mark.parametrize("text", ["nas", "nas:e", ":/e", "x;y:/z", "nas:/e;;", "nas :/e"])
def test_what_names_no_export_is_refused(text):
    with pytest.raises(ConfigError, match=r"nfs\.exports"):
        load(environment={"RUNVOL_NFS_EXPORTS": text})
