"""The alerts, as Prometheus' own promtool judges them: each fires once, on its trouble alone, and not before its time."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from runvol import metric_table

MONITORING = Path(__file__).resolve().parents[2] / "deploy/monitoring"
ALERTS = MONITORING / "alerts.yaml"
_OF = 'job="runvol",instance="node-1"'
_VOLUME = f'{_OF},volume="v",namespace="default",persistentvolumeclaim="data",pod="db-0"'
# By alert, the series of one trouble (Prometheus' notation: a start, `+` what is added a minute, `x` how often).
TROUBLE: dict[str, dict[str, str]] = {
    "RunvolDown": {f"up{{{_OF}}}": "1 0x600", f'runvol_build_info{{{_OF},part="csi",version="1"}}': "1 stale"},
    "RunvolCallsHung": {f'runvol_csi_calls_hung{{{_OF},method="NodeStageVolume"}}': "1x600"},
    "RunvolCallsFail": {
        f'runvol_csi_calls_total{{{_OF},method="NodeStageVolume",code="UNAVAILABLE"}}': "0+10x600",
        f'runvol_csi_calls_total{{{_OF},method="NodeStageVolume",code="OK"}}': "0+10x600",
    },
    "RunvolPublishRefused": {
        f'runvol_csi_calls_total{{{_OF},method="NodePublishVolume",code="FAILED_PRECONDITION"}}': "0+1x600"
    },
    "RunvolCallsQueue": {f'runvol_csi_calls_queued{{{_OF},pool="node"}}': "3x600"},
    "RunvolSystemCallsBlocked": {f"runvol_blocked_system_calls{{{_OF}}}": "1x600"},
    "RunvolVolumeAlmostFull": {
        f"runvol_volume_used_bytes{{{_VOLUME}}}": "96x600",
        f"runvol_volume_capacity_bytes{{{_VOLUME}}}": "100x600",
        f"runvol_volume_inodes{{{_VOLUME}}}": "10x600",
    },
    "RunvolVolumeFillsSoon": {
        f"runvol_volume_used_bytes{{{_VOLUME}}}": "70000x600",
        f"runvol_volume_available_bytes{{{_VOLUME}}}": "30000-50x600",
        f"runvol_volume_capacity_bytes{{{_VOLUME}}}": "100000x600",
        f"runvol_volume_inodes{{{_VOLUME}}}": "10x600",
    },
    "RunvolVolumeInodesAlmostGone": {
        f"runvol_volume_inodes_used{{{_VOLUME}}}": "99x600",
        f"runvol_volume_inodes{{{_VOLUME}}}": "100x600",
    },
    "RunvolVolumeUnmeasured": {f"runvol_volume_unmeasured{{{_VOLUME}}}": "1x600"},
    "RunvolHandoffLost": {f'runvol_handoffs{{{_OF},dialect="kata",state="missing"}}': "1x600"},
    "RunvolClaimsDamaged": {f"runvol_claims_damaged{{{_OF}}}": "1x600"},
    "RunvolSurveyOld": {
        f"runvol_survey_timestamp_seconds{{{_OF}}}": "0x600", f"runvol_survey_interval_seconds{{{_OF}}}": "30x600"
    },
    "RunvolMetricsOld": {f'runvol_collected_timestamp_seconds{{{_OF},part="pool"}}': "0x600"},
    "RunvolRuntimeUnknown": {f'runvol_detections_total{{{_OF},decided_by="nobody"}}': "0+1x600"},
    "RunvolWatchEnded": {f'runvol_watch_healthy{{{_OF},watch="pods of this node"}}': "0x600"},
    "RunvolJobStuck": {f'runvol_job_age_seconds{{{_OF},work="snapshot s of v"}}': "0+60x600"},
    "RunvolDoctorBroken": {f'runvol_doctor_findings{{{_OF},id="kernel.loop",state="broken"}}': "1x600"},
    "RunvolDoctorOld": {
        f"runvol_doctor_timestamp_seconds{{{_OF}}}": "1x600", f"runvol_doctor_interval_seconds{{{_OF}}}": "900x600"
    },
    "RunvolBackendAlmostFull": {
        f'runvol_backend_available_bytes{{{_OF},backend="loop"}}': "1x600",
        f'runvol_backend_promised_bytes{{{_OF},backend="loop"}}': "99x600",
    },
    "RunvolPoolNotReady": {f"runvol_pool_ready{{{_OF}}}": "0x600"},
    "RunvolPoolAlmostFull": {
        f"runvol_pool_data_used_bytes{{{_OF}}}": "91x600", f"runvol_pool_data_bytes{{{_OF}}}": "100x600"
    },
    "RunvolPoolMetadataAlmostFull": {
        f"runvol_pool_metadata_used_bytes{{{_OF}}}": "91x600", f"runvol_pool_metadata_bytes{{{_OF}}}": "100x600"
    },
    "RunvolPoolTakesNoWrites": {f'runvol_pool_mode{{{_OF},mode="rw"}}': "0x600"},
    "RunvolPoolNeedsCheck": {f"runvol_pool_needs_check{{{_OF}}}": "1x600"},
    "RunvolPoolIdsAlmostGone": {f"runvol_pool_device_ids_given_ratio{{{_OF}}}": "0.8x600"},
    "RunvolStoreOfAnotherPast": {f"runvol_store_past{{{_OF}}}": "1x600"},
    "RunvolStoreRowsDamaged": {f"runvol_store_rows_damaged{{{_OF}}}": "2x600"},
    "RunvolBackgroundTrouble": {f"runvol_background_troubles{{{_OF}}}": "1x600"},
    "RunvolGaugeDoesNotFollow": {f"runvol_gauge_trouble{{{_OF}}}": "1x600"},
    "RunvolNriDisconnected": {f"runvol_nri_connected{{{_OF}}}": "0x600"},
    "RunvolNriPlaceholder": {f'runvol_nri_containers_total{{{_OF},outcome="placeholder"}}': "0+1x600"},
}  # fmt: skip
# The same by another way.
TROUBLE_TOO: list[tuple[str, dict[str, str]]] = [
    # It has not come to an end once.
    ("RunvolDoctorOld", {
        f"runvol_doctor_timestamp_seconds{{{_OF}}}": "0x600", f"runvol_doctor_interval_seconds{{{_OF}}}": "900x600",
        f"process_start_time_seconds{{{_OF}}}": "60x600",
    }),
    # Containers are found when the plugin starts, before anybody has scraped it: their number is never seen to rise.
    ("RunvolNriPlaceholder", {
        f'runvol_nri_containers_total{{{_OF},outcome="placeholder"}}': "_x489 2x600",
        f"process_start_time_seconds{{{_OF}}}": "_x489 29300x600",
    }),
]  # fmt: skip
_NAME = re.compile(r"\brunvol_[a-z0-9_]+")


def alerts() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {one["alert"]: one for one in group["rules"]}


def test_promtool_takes_the_rules() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", "--lint-fatal", str(ALERTS)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(alerts())} rules found" in checked.stdout


def test_there_is_a_trouble_for_each_alert() -> None:
    assert TROUBLE.keys() == alerts().keys()


def test_an_alert_fires_once_on_its_trouble_and_no_other_does(tmp_path: Path) -> None:
    """All in one run: promtool takes longer to start than to judge."""
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    judge(tmp_path, [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": key, "values": value} for key, value in series.items()],
            "promql_expr_test": [
                {"expr": firing, "eval_time": "0m", "exp_samples": []},
                {"expr": firing, "eval_time": "500m", "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}]},
            ],
        }
        for name, series in [*TROUBLE.items(), *TROUBLE_TOO]
    ])  # fmt: skip


def judge(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    place = tmp_path / "test.yaml"
    place.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": tests}))
    ran = subprocess.run(["promtool", "test", "rules", str(place)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_nothing_fires_on_a_node_that_is_well(tmp_path: Path) -> None:
    series = {
        f"up{{{_OF}}}": "1x600",
        f'runvol_build_info{{{_OF},part="csi",version="1"}}': "1x600",
        f'runvol_csi_calls_total{{{_OF},method="NodeStageVolume",code="OK"}}': "0+10x600",
        f"runvol_volume_used_bytes{{{_VOLUME}}}": "50x600",
        f"runvol_volume_available_bytes{{{_VOLUME}}}": "50x600",
        f"runvol_volume_capacity_bytes{{{_VOLUME}}}": "100x600",
        f"runvol_volume_inodes{{{_VOLUME}}}": "10x600",
        f"runvol_volume_inodes_used{{{_VOLUME}}}": "1x600",
        f"runvol_survey_timestamp_seconds{{{_OF}}}": "0+60x600",
        f"runvol_survey_interval_seconds{{{_OF}}}": "30x600",
        f"runvol_doctor_timestamp_seconds{{{_OF}}}": "0+60x600",
        f"runvol_doctor_interval_seconds{{{_OF}}}": "900x600",
        f"process_start_time_seconds{{{_OF}}}": "0x600",
        # Processes that look seldom, as they are told, and one without a doctor.
        'runvol_survey_timestamp_seconds{instance="seldom"}': " ".join(f"{3600 * hour}x59" for hour in range(10)),
        'runvol_survey_interval_seconds{instance="seldom"}': "3600x600",
        'runvol_doctor_timestamp_seconds{instance="seldom"}': "20x600",
        'runvol_doctor_interval_seconds{instance="seldom"}': "86400x600",
        'process_start_time_seconds{instance="snapshotter"}': "0x600",
        # Containers that were without their volumes, long ago.
        f'runvol_nri_containers_total{{{_OF},outcome="placeholder"}}': "2x600",
        f'runvol_collected_timestamp_seconds{{{_OF},part="pool"}}': "0+60x600",
        f'runvol_handoffs{{{_OF},dialect="kata",state="open"}}': "1x600",
        f"runvol_pool_ready{{{_OF}}}": "1x600",
        f'runvol_pool_mode{{{_OF},mode="rw"}}': "1x600",
        f'runvol_pool_mode{{{_OF},mode="ro"}}': "0x600",
        f"runvol_nri_connected{{{_OF}}}": "1x600",
        # A raw device, which is as full as it is large.
        f'runvol_volume_used_bytes{{{_OF},volume="raw"}}': "100x600",
        f'runvol_volume_capacity_bytes{{{_OF},volume="raw"}}': "100x600",
        f'runvol_volume_available_bytes{{{_OF},volume="raw"}}': "0x600",
    }
    judge(tmp_path, [{
        "interval": "1m", "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": [{"expr": "count(ALERTS)", "eval_time": "500m", "exp_samples": []}]}])  # fmt: skip


def test_alerts_and_dashboard_name_only_metrics_that_there_are() -> None:
    known = metric_table.sample_names()
    for path in (ALERTS, MONITORING / "dashboard.json"):
        named = set(_NAME.findall(path.read_text()))
        assert named, path
        assert named <= known, (path, named - known)
    expressions = " ".join(one["expr"] for one in alerts().values())
    assert set(_NAME.findall(expressions)) == {
        name for series in TROUBLE.values() for key in series for name in _NAME.findall(key)
    }


def test_the_chart_has_the_same_alerts() -> None:
    chart = Path(__file__).resolve().parents[2] / "deploy/helm/runvol/alerts.yaml"
    assert chart.read_text() == ALERTS.read_text()


def test_names_follow_prometheus_rules() -> None:
    """Prometheus' naming page: base units, `_total` for counters alone; and one meaning a name."""
    families = metric_table.families()
    assert len({one.name for one in families}) == len(families)
    for one in families:
        assert re.fullmatch(r"runvol_[a-z0-9]+(_[a-z0-9]+)*", one.name), one.name
        assert one.name.endswith("_total") == (one.kind == "counter"), one.name
        assert not re.search(r"_(ms|milliseconds|kb|kib|mib|gib|blocks|percent|minutes)(_|$)", one.name), one.name
        assert one.help.endswith(".") or one.help.endswith(")"), one.name
        assert one.help[0].isupper() or one.help[0].isdigit(), one.name
        assert not {"job", "instance", "le", "quantile"} & set(one.labels), one.name


def test_the_page_has_the_table_as_it_is() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    assert f"<!-- from here made -->\n\n{metric_table.as_markdown()}\n<!-- to here made -->" in page, (
        "docs/metrics.md is not what the code says; the text is metric_table.as_markdown()"
    )
