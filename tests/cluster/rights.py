"""What each service account of the chart may do, and what it does: the API server writes down every request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster.cluster import Cluster
from tests.cluster.installed import NAMESPACE

# A verb, an API group, a resource.
Right = tuple[str, str, str]
# What a round of the tests does not do, by role; what breaks without it is in `removals`.
ELSEWHERE: dict[str, set[Right]] = {
    # Where the watch is away.
    "runvol-plugin": {("get", "node.k8s.io", "runtimeclasses"), ("create", "", "events"), ("patch", "", "events")},
}


class Request(NamedTuple):
    """`program`: as it names itself; `answer`: an HTTP status."""

    account: str
    program: str
    right: Right
    answer: int


def audit(directory: Path) -> list[str]:
    """Flags for kube-apiserver: a line for each request of the chart's accounts."""
    policy = directory / "audit.json"
    policy.write_text(json.dumps({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "userGroups": [f"system:serviceaccounts:{NAMESPACE}"]}, {"level": "None"}],
    }))  # fmt: skip
    return [f"--audit-policy-file={policy}", f"--audit-log-path={directory}/audit.log"]


def requests(directory: Path, since: int = 0) -> Iterator[Request]:
    """Those after the first `since` bytes of the log."""
    with (directory / "audit.log").open("rb") as log:
        log.seek(since)
        for line in log.read().rpartition(b"\n")[0].splitlines():  # the last one may be half written
            event = json.loads(line)
            what = event.get("objectRef", {})
            if event["user"]["username"].startswith(f"system:serviceaccount:{NAMESPACE}:"):
                resource = what.get("resource", "") + (f"/{what['subresource']}" if "subresource" in what else "")
                account = event["user"]["username"].rpartition(":")[2]
                program = event.get("userAgent", "").partition("/")[0]
                right = event["verb"], what.get("apiGroup", ""), resource
                yield Request(account, program, right, event["responseStatus"]["code"])


def granted(cluster: Cluster) -> Iterator[tuple[str, set[str], set[Right]]]:
    """Each role, the accounts that have it, and what it allows."""
    bound: dict[tuple[str, str], set[str]] = {}
    for kind in ("clusterrolebinding", "rolebinding"):
        for binding in cluster.list(kind, f"--namespace={NAMESPACE}"):
            accounts = {one["name"] for one in binding.get("subjects") or () if one.get("namespace") == NAMESPACE}
            if accounts:
                bound.setdefault((binding["roleRef"]["kind"], binding["roleRef"]["name"]), set()).update(accounts)
    for (kind, name), accounts in sorted(bound.items()):
        role = cluster.find(kind, name, NAMESPACE)
        assert role, name
        yield name, accounts, of(role)


def of(role: dict[str, Any]) -> set[Right]:
    """What a Role or ClusterRole allows."""
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def is_used(right: Right, used: set[Right]) -> bool:
    """Whether it was used, or is that half of following objects which today's clients come back to when the other one fails."""
    verb, group, resource = right
    return right in used or (
        verb in ("list", "watch") and bool({("list", group, resource), ("watch", group, resource)} & used)
    )
