"""What each service account of the chart may do, and what it does: the API server writes down every request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.installed import NAMESPACE

# A verb, an API group, a resource.
Right = tuple[str, str, str]
# What a round of the tests does not do, and who does it.
ELSEWHERE = {
    ("update", "", "events"): "an event is patched, not updated, by today's sidecars; the sidecars' own roles have it",
}


def audit(directory: Path) -> list[str]:
    """Flags for kube-apiserver: a line for each request of the chart's accounts."""
    policy = directory / "audit.json"
    policy.write_text(json.dumps({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "userGroups": [f"system:serviceaccounts:{NAMESPACE}"]}, {"level": "None"}],
    }))  # fmt: skip
    return [f"--audit-policy-file={policy}", f"--audit-log-path={directory}/audit.log"]


def requests(directory: Path) -> Iterator[tuple[str, Right, int]]:
    """Account, right and answer of each request."""
    for line in (directory / "audit.log").read_text().splitlines():
        event = json.loads(line)
        what = event.get("objectRef", {})
        if event["user"]["username"].startswith(f"system:serviceaccount:{NAMESPACE}:"):
            resource = what.get("resource", "") + (f"/{what['subresource']}" if "subresource" in what else "")
            account = event["user"]["username"].rpartition(":")[2]
            yield account, (event["verb"], what.get("apiGroup", ""), resource), event["responseStatus"]["code"]


def granted(cluster: Cluster) -> dict[str, set[Right]]:
    """By account, what the roles that are bound to it allow."""
    found: dict[str, set[Right]] = {}
    for kind in ("clusterrolebinding", "rolebinding"):
        for binding in cluster.list(kind, f"--namespace={NAMESPACE}"):
            for subject in binding.get("subjects") or ():
                if subject.get("namespace") != NAMESPACE or subject["kind"] != "ServiceAccount":
                    continue
                role = cluster.find(binding["roleRef"]["kind"], binding["roleRef"]["name"], NAMESPACE)
                assert role, binding
                rights = found.setdefault(subject["name"], set())
                for rule in role["rules"]:
                    rights |= {(verb, group, resource) for verb in rule["verbs"]
                               for group in rule["apiGroups"] for resource in rule["resources"]}  # fmt: skip
    return found
